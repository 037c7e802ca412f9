"""What is shown while a batch is sampled: a moving bar, or a plain line now and then in a pipe."""
import sys
import time

from tqdm import tqdm

from support import ranks

QUIET = 30  # seconds between two lines where stdout is no terminal


class LiveBar:
    """Rows that have ended, of `total`; use it as a context manager around the chunks of a batch.

    A row that still goes on counts by its tokens, as if it went to the limit: so the time left is
    rather estimated too long than too short.
    """

    def __init__(self, label, total, max_new_tokens):
        self.label = label
        self.total = total
        self.max_new_tokens = max_new_tokens
        self.before = 0  # rows of earlier chunks
        self.last_line = time.time()

    def __enter__(self):
        layout = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"
        hidden = True if ranks.RANK else None  # None: shown if stderr is a terminal
        self.bar = tqdm(desc=self.label, total=self.total, leave=False, miniters=0,
                        bar_format=layout, disable=hidden)
        return self

    def __exit__(self, *_):
        self.bar.close()

    def start_chunk(self, rows):
        self.chunk = rows

    def progress(self, tokens, ended):
        """Called by generate: tokens sampled so far in this chunk, and its rows that have ended."""
        done = self.before + ended
        text = f"{done}/{self.total} rows, token {tokens} of {self.max_new_tokens}"
        if self.bar.disable:
            self.print_line(text)
            return
        partly = (self.chunk - ended) * tokens / self.max_new_tokens
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update(done + partly - self.bar.n)

    def end_chunk(self):
        self.before += self.chunk

    def print_line(self, text):
        """At most one plain line every QUIET seconds: a long evaluation must not seem to hang."""
        if not ranks.RANK and not sys.stdout.isatty() and time.time() - self.last_line > QUIET:
            print(f"{self.label}: {text}", flush=True)
            self.last_line = time.time()
