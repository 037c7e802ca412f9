"""The text side of a model folder: tokenizer, chat template and stop tokens."""
import hashlib
import json
from pathlib import Path

from support import sandbox
from support.errors import InputError
from support.files import LARGEST_TOKENIZER, read_json, read_text

LONGEST_PROMPT = 2**14  # tokens; a pass over a prompt needs memory for their square
# The end-of-turn tokens of Qwen2.5 and Llama 3; a model may use any of those it has.
END_OF_TURN = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end_of_text|>", "<|eom_id|>")
SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")  # templates may use these


class Chat:
    """Turns questions into token ids and token ids into text.

    `vocab` is the number of ids that the tokenizer really has; the model's embedding table may
    have more rows. `stop_ids` are the ids that end a response.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        self.tokenizer = read_text(self.folder / "tokenizer.json", LARGEST_TOKENIZER)
        config = read_json(self.folder / "tokenizer_config.json")
        self.template = self._read_template(config)
        self.special = {}  # the special tokens' names and texts
        for name in SPECIAL_TOKENS:
            token = config.get(name)
            if isinstance(token, dict):
                token = token.get("content")
            if isinstance(token, str):
                self.special[name] = token
        self._render()
        ends = [*END_OF_TURN]
        if "eos_token" in self.special:
            ends.append(self.special["eos_token"])
        self.vocab, ids = self._tokenize("find", ends)
        if not self.vocab:
            raise InputError(f"{self.folder / 'tokenizer.json'}: holds no tokens")
        self.stop_ids = self._read_stop_ids(set(ids.values()))

    def _read_template(self, config):
        path = self.folder / "chat_template.jinja"  # newer checkpoints keep the template here
        if path.is_file():
            return read_text(path)
        template = config.get("chat_template")
        if isinstance(template, list):  # several templates with names
            default = [entry.get("template") for entry in template
                       if isinstance(entry, dict) and entry.get("name") == "default"]
            template = default[0] if default else None
        if not isinstance(template, str):
            raise InputError(f"{self.folder / 'tokenizer_config.json'}: has no chat_template; "
                             "use an instruct model")
        return template

    def _read_stop_ids(self, stop_ids):
        """The ids of end-of-turn tokens, and those that the two config files name."""
        for name in ("generation_config.json", "config.json"):
            path = self.folder / name
            if not path.is_file():
                continue
            ids = read_json(path).get("eos_token_id")
            for i in ids if isinstance(ids, list) else [ids]:
                if type(i) is int and 0 <= i < self.vocab:  # `type`, because True is an int too
                    stop_ids.add(i)
        if not stop_ids:
            raise InputError(f"{self.folder}: no end-of-turn token in generation_config.json, "
                             "config.json or the tokenizer")
        return stop_ids

    def _tokenize(self, question, value):
        """The tokenizer's answer, see sandbox.tokenize."""
        answer, error = sandbox.tokenize(self.tokenizer, question, value)
        if error:
            raise InputError(f"{self.folder / 'tokenizer.json'}: "
                             f"cannot be used as a tokenizer ({error})")
        return answer

    def _render(self, values=None):
        """The text that the template makes of the values. Without values: check its syntax."""
        text, error = sandbox.render(self.template, values)
        if error:
            raise InputError(f"{self.folder}: its chat template fails ({error})")
        return text

    def text(self, prompt, system=None, response=None):
        """The conversation as the template writes it.

        It ends where the assistant's turn begins, or with `response` as the assistant's turn.
        """
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": prompt})
        if response is not None:
            messages.append({"role": "assistant", "content": response})
        values = {"messages": messages, "add_generation_prompt": response is None}
        return self._render(values | self.special)

    def prompt(self, prompt, system=None):
        """The token ids of a prompt."""
        ids = self._tokenize("encode", self.text(prompt, system))
        if not ids:
            raise InputError(f"{self.folder}: its chat template and tokenizer make nothing of a "
                             "question")
        if len(ids) > LONGEST_PROMPT:
            raise InputError(f"a prompt has {len(ids):,} tokens ({prompt[:50]!r}...); "
                             f"the limit is {LONGEST_PROMPT:,}")
        return ids

    def encode(self, text):
        """The token ids of a text as it stands, without the template."""
        return self._tokenize("encode", text)

    def response(self, prompt, response, system=None):
        """The token ids of a given response, up to and including the first stop token (for SFT)."""
        before = self.text(prompt, system)
        whole = self.text(prompt, system, response)
        ids = self._tokenize("encode", whole[len(before):])
        stops = [i for i, token in enumerate(ids) if token in self.stop_ids]
        if not whole.startswith(before) or not stops:
            raise InputError(f"{self.folder}: its chat template does not write an assistant's "
                             "turn as prompt, response, stop token")
        return ids[:stops[0] + 1]

    def decode(self, ids, mask):
        """The text of one response: ids (T,), mask (T,) bool. Stop tokens leave no text.

        What follows the stop token is masked out, so it never reaches a score.
        """
        if ids.dim() != 1 or mask.shape != ids.shape:
            raise ValueError(f"decode takes one row: ids (T,) and mask (T,), "
                             f"not {tuple(ids.shape)} and {tuple(mask.shape)}")
        return self._tokenize("decode", ids[mask].tolist())

    def limit_vocab(self, model):
        """Cut the model's logits to the ids that the tokenizer has; InputError if it has more."""
        if self.vocab > model.vocab:
            raise InputError(f"{self.folder}: the tokenizer has {self.vocab} token ids, the "
                             f"model's table only {model.vocab} rows")
        model.vocab = self.vocab

    def fingerprint(self):
        """A sha256 of all that the prompts' token ids and the ends of responses depend on."""
        tokenizer_hash = hashlib.sha256(self.tokenizer.encode()).hexdigest()
        parts = [self.template, tokenizer_hash, self.special, sorted(self.stop_ids)]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
