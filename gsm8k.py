"""Problems, prompts and rewards: GSM8K and files shaped like it, MATH and files shaped like that.

Three scores, always reported side by side, because much of a gain can be answer format (arXiv 2602.04118 reports the
strict one; on the lenient one a careful reproduction saw far less at 13 numbers):
    strict   the text must say "#### <number>" in its last 300 characters, the paper's rule; the last one counts.
    lenient  the strict answer if there is one, else the last number anywhere in the text.
    format   the text says "#### <number>" there, whatever the number. Trained on (--reward format), it is the control:
             what it gains on the other two was format.

A row with a "problem" instead of a "question" is MATH's kind: the prompt asks for \\boxed{}, strict and format want the
last \\boxed{} of the text, and answers are LaTeX, compared by boxed.py.
"""
import hashlib
import http.client
import os
import re
import urllib.request
from pathlib import Path

from tokenizers import Tokenizer

from boxed import boxed, same
from files import InputError, parse_json, read_json, read_text, replacing
from template import render

SCORES = ("strict", "lenient", "format")
INSTRUCTION = ' Let\'s think step by step and output the final answer after "####".'  # the paper's, one user turn
BOXED_INSTRUCTION = "\nPlease reason step by step, and put your final answer within \\boxed{}."  # SimpleRL's boxed template
URL = "https://raw.githubusercontent.com/openai/grade-school-math/3101c7d5072418e28b9008a6636bde82a006892c/grade_school_math/data/"
SHA256 = {"train.jsonl": "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465",
          "test.jsonl": "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14"}
END_OF_TURN = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end_of_text|>", "<|eom_id|>")  # Qwen2.5 and Llama 3

NUMBER = r"[-+]?[$€£]?[-+]?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)"
STRICT = re.compile(r"####[ \t]*(" + NUMBER + ")")
ANY = re.compile(NUMBER)


def canonical(number):
    """One spelling per value: "$1,800.00" -> "1800", "-07.50" -> "-7.5", "-0" -> "0". Strings only: no digit is too many."""
    sign = "-" if "-" in number else ""
    whole, _, fraction = re.sub(r"[^\d.]", "", number).partition(".")
    text = (whole.lstrip("0") or "0") + ("." + fraction.rstrip("0")).rstrip(".")
    return text if text == "0" else sign + text


def extract_answer(text, strict=True):
    """The answer a text gives, as a canonical number string, or None. strict and lenient: see the module docstring."""
    text = text.replace("\u2212", "-").replace("\\$", "$")  # the typographic minus; LaTeX's dollar
    text = re.sub(r"(?<=\d)[\u00a0\u2009\u202f](?=\d{3})", "", text)  # thin spaces between thousands
    found = STRICT.findall(text[-300:])
    if not found and not strict:
        # a minus glued to a number or word before it is a hyphen or a subtraction: "10-3" ends in 3, not in -3
        found = ANY.findall(re.sub(r"(?<=[\w)])-(?=\d)", " ", text))
    return canonical(found[-1]) if found else None


def score(text, problem):
    """{"strict", "lenient", "format": 1.0 or 0.0} of a response to a row of read_problems."""
    if problem["boxed"]:
        answer, gold = boxed(text), problem["answer"]
        strict = answer is not None and same(answer, gold)
        last = extract_answer(text, strict=False) if answer is None else None
        lenient = strict or (last is not None and same(last, gold))
    else:
        answer, gold = extract_answer(text), problem["gold"]
        strict, lenient = answer == gold, extract_answer(text, strict=False) == gold
    return {"strict": float(strict), "lenient": float(lenient), "format": float(bool(answer))}


def download(name, folder):
    """One GSM8K file into the cache folder, checked against its sha256 before it gets its name."""
    path = folder / name
    if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == SHA256[name]:
        return path
    print(f"downloading {URL}{name} to {folder}", flush=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(URL + name, timeout=60) as response:
            data = response.read()
    except (OSError, http.client.HTTPException) as error:  # the second: a connection cut in the middle
        raise InputError(f"--data gsm8k: {name} cannot be downloaded to {folder} ({error}); go online once, set TINYLORA_CACHE, "
                         f"or point --data at a folder with train.jsonl and test.jsonl") from None
    if hashlib.sha256(data).hexdigest() != SHA256[name]:
        raise InputError(f"--data gsm8k: {URL}{name} has changed (its sha256 is not {SHA256[name][:12]}...); nothing was kept")
    with replacing(path) as temporary:
        temporary.write_bytes(data)
    return path


def read_problems(path):
    """A jsonl file -> a list of {"prompt": the user's turn, "answer", "boxed", "gold" (GSM8K's kind), "solution" (or None)}.

    Rows have "question" and "answer" (a worked solution that ends in "#### <number>", or the bare number), or MATH's
    "problem" and "answer" (LaTeX or a number; "solution" beside it, if at all). Rows of MATH's kind with an empty answer
    are left out, as its copies have a few. InputError names the file and the line.
    """
    lines = read_text(path, 1 << 30).split("\n")  # splitlines would also cut at U+2028
    rows = []
    for n, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}, line {n}: not JSON ({error})") from None
        row = row if isinstance(row, dict) else {}
        is_boxed = isinstance(row.get("problem"), str)
        question, answer, solution = row.get("problem" if is_boxed else "question"), row.get("answer"), row.get("solution")
        if type(answer) in (int, float):
            answer = f"{answer:.0f}" if type(answer) is float and answer == answer // 1 else str(answer)
        if not isinstance(question, str) or not isinstance(answer, str) or not question.strip() or not (is_boxed or answer.strip()):
            raise InputError(f'{path}, line {n}: needs "question" and "answer", or "problem" and "answer", all text')
        if is_boxed:
            if answer.strip():
                rows.append({"prompt": question + BOXED_INSTRUCTION, "answer": answer, "boxed": True, "solution": solution if isinstance(solution, str) else None})
            continue
        gold = extract_answer(answer, strict=False)
        if gold is None:
            raise InputError(f"{path}, line {n}: there is no number in its answer")
        worked = re.sub("<<[^<>]*>>", "", answer) if "####" in answer else None  # <<2*3=6>> is for calculators, not for readers
        rows.append({"prompt": question + INSTRUCTION, "answer": answer, "boxed": False, "gold": gold, "solution": worked})
    if not rows:
        raise InputError(f"{path}: holds no problems")
    return rows


def load_data(data, eval_only=False):
    """--data -> (train, test): "gsm8k" is downloaded once into the cache, anything else is a folder; a file is for evaluation."""
    if data == "gsm8k":
        cache = Path(os.environ.get("TINYLORA_CACHE") or Path.home() / ".cache" / "tinylora") / "gsm8k"
        return tuple(read_problems(download(name, cache)) for name in SHA256)
    if Path(data).is_file():
        if not eval_only:
            raise InputError(f"--data {data}: one file is enough for --eval-only; training takes a folder with train.jsonl and test.jsonl")
        return [], read_problems(data)
    if not Path(data).is_dir():
        raise InputError(f"--data {data}: no such file or folder; use gsm8k, or a folder with train.jsonl and test.jsonl")
    return tuple(read_problems(Path(data) / f"{split}.jsonl") for split in ("train", "test"))


class Chat:
    """A model folder's text side: tokenizer, chat template, stop ids. `vocab` is how many ids the tokenizer really has."""

    def __init__(self, folder):
        self.folder = folder = Path(folder)
        self.tokenizer = self.ask(Tokenizer.from_str, read_text(folder / "tokenizer.json"))
        self.tokenizer.no_truncation()  # some files carry a limit from their training
        self.tokenizer.no_padding()
        config = read_json(folder / "tokenizer_config.json")
        template = config.get("chat_template")
        if (folder / "chat_template.jinja").is_file():  # where newer checkpoints keep it
            template = read_text(folder / "chat_template.jinja")
        if isinstance(template, list):  # several named templates
            template = next((t.get("template") for t in template if isinstance(t, dict) and t.get("name") == "default"), None)
        if not isinstance(template, str):
            raise InputError(f"{folder / 'tokenizer_config.json'}: has no chat_template; use an instruct model")
        self.template, self.special = template, {}
        for key in ("bos_token", "eos_token", "pad_token", "unk_token"):
            token = config.get(key)
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                self.special[key] = token
        self.render()
        vocabulary = self.tokenizer.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise InputError(f"{folder / 'tokenizer.json'}: holds no tokens")
        self.vocab = max(vocabulary.values()) + 1
        self.stop_ids = {vocabulary[t] for t in (*END_OF_TURN, self.special.get("eos_token")) if t in vocabulary}
        for name in ("generation_config.json", "config.json"):
            eos = read_json(folder / name).get("eos_token_id") if (folder / name).is_file() else None
            self.stop_ids |= {i for i in (eos if isinstance(eos, list) else [eos]) if type(i) is int and 0 <= i < self.vocab}
        if not self.stop_ids:
            raise InputError(f"{folder}: no end-of-turn token in generation_config.json, config.json or the tokenizer")

    def ask(self, function, *args, **kw):
        """What a function of the tokenizer returns. The library raises bare Exception, and its panics are not even that."""
        try:
            return function(*args, **kw)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            raise InputError(f"{self.folder / 'tokenizer.json'}: cannot be used as a tokenizer ({error})") from None

    def render(self, values=None):
        """What the template makes of the values, or None, of its grammar alone. It is code, and runs elsewhere: template.py."""
        text, error = render(self.template, values)
        if error:
            raise InputError(f"{self.folder}: its chat template fails ({error})")
        return text

    def text(self, prompt, system=None, response=None):
        """The conversation as the model's own template writes it: ready for the assistant's turn, or with `response` as that turn."""
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": prompt})
        if response is not None:
            messages.append({"role": "assistant", "content": response})
        return self.render({"messages": messages, "add_generation_prompt": response is None} | self.special)

    def prompt(self, prompt, system=None):
        """Token ids of the prompt. The template writes any BOS itself, so the tokenizer must not add a second one."""
        return self.ask(self.tokenizer.encode, self.text(prompt, system), add_special_tokens=False).ids

    def response(self, prompt, response, system=None):
        """Token ids that the model should have answered with, up to and including the first stop token (for SFT)."""
        before, whole = self.text(prompt, system), self.text(prompt, system, response)
        ids = self.ask(self.tokenizer.encode, whole[len(before):], add_special_tokens=False).ids
        end = next((i for i, token in enumerate(ids, 1) if token in self.stop_ids), None)
        if not whole.startswith(before) or end is None:
            raise InputError(f"{self.folder}: its chat template does not write an assistant's turn as prompt, response, stop token")
        return ids[:end]

    def decode(self, ids, mask):
        """The response's text without its stop token: nothing after the stop token is ever scored."""
        return self.ask(self.tokenizer.decode, ids[mask].tolist(), skip_special_tokens=True)
