"""Hugging Face transformers: capture the KV of prompts, inject it again, describe models."""

from cachegen.hf.capture import Capture, capture, capture_file, chunk_of
from cachegen.hf.fingerprint import weights_fingerprint
from cachegen.hf.inject import clone, forward_suffix, generate, inject, planes, reserve
from cachegen.hf.models import check_model, geometry_of
from cachegen.hf.rope import rope_spec

__all__ = [
    "Capture",
    "capture",
    "capture_file",
    "check_model",
    "chunk_of",
    "clone",
    "forward_suffix",
    "generate",
    "geometry_of",
    "inject",
    "planes",
    "reserve",
    "rope_spec",
    "weights_fingerprint",
]
