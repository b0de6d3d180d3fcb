"""Loading a model and its tokenizer, offline or not, with errors that say what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from cachegen.errors import UnsupportedModelError
from cachegen.hf.models import check_model


def begin_and_text(tokenizer: Any, text: str) -> tuple[list[int], list[int]]:
    """Tokenise a text apart from the tokens that begin every context.

    Returns: the ids a tokenizer puts in front of any text (attention sinks, often), and the rest.
    """
    begin = list(tokenizer("")["input_ids"])
    ids = list(tokenizer(text)["input_ids"])
    if ids[: len(begin)] != begin:
        return [], ids
    return begin, ids[len(begin) :]


def load_model(name: str, *, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Load a causal LM in eval mode, and its tokenizer.

    name: a folder, or the name of a model that transformers finds in its cache or on a hub.
    dtype: of weights and computation. Raises: UnsupportedModelError; FileNotFoundError for a path
        that does not exist.
    """
    looks_like_path = name.startswith((".", "/", "~")) or name.count("/") > 1
    if looks_like_path and not Path(name).expanduser().is_dir():
        raise FileNotFoundError(f"no model folder {name}")
    source = str(Path(name).expanduser())
    quiet: Any = logging
    quiet.set_verbosity_error()
    quiet.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    except (OSError, ValueError, KeyError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UnsupportedModelError(
            f"model {name}",
            got=first,
            expected="a causal language model and its tokenizer",
            remedy="pass a folder with config.json, weights and tokenizer.json",
        ) from None
    check_model(model)
    return model.eval(), tokenizer


def load_tokenizer(name: str) -> Any:
    """Load the tokenizer of a model alone. Raises: UnsupportedModelError if there is none."""
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise _no_part(name, "a tokenizer", error) from None


def load_config(name: str) -> Any:
    """Load the configuration of a model alone. Raises: UnsupportedModelError."""
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise _no_part(name, "a folder with config.json", error) from None


def _no_part(name: str, expected: str, error: Exception) -> UnsupportedModelError:
    first = str(error).splitlines()[0] if str(error) else type(error).__name__
    return UnsupportedModelError(f"model {name}", got=first, expected=expected)
