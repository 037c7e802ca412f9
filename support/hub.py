"""Turns --model into a folder: one on this machine, or a download from the Hugging Face hub."""
import functools
import sys
from pathlib import Path

from support.errors import InputError


@functools.cache  # the flags and the loader both ask; the hub is asked once
def find_model(name, files=("*.json", "*.safetensors", "*.jinja")):
    """The folder of a model. `owner/name` is looked up in the hub's cache, then on the hub.

    Only these files are fetched: the config, the tokenizer and safetensors.
    """
    if Path(name).is_dir():
        return name
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise InputError(f"--model {name}: no such folder")
    from huggingface_hub import snapshot_download  # installed with tokenizers
    from huggingface_hub.utils import disable_progress_bars, logging
    logging.set_verbosity_error()  # retries and missing tokens: a failure is reported below
    if not sys.stderr.isatty():
        disable_progress_bars()  # the library itself checks this for some of its bars only
    try:
        return snapshot_download(
            name, allow_patterns=list(files),
            # no subfolders, and no index of pytorch_model.bin
            ignore_patterns=["*/*", "*[!s].index.json"])
    except Exception as error:  # offline, no such repository, no access, a full disk
        reason = " ".join(str(error).split())  # the library writes paragraphs
        raise InputError(
            f"--model {name}: neither a folder here nor to be had from the hub; check the name, "
            f"the network and, for a gated model, HF_TOKEN "
            f"({type(error).__name__}: {reason})") from None
