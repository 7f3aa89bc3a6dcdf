"""Terms as tensors and text, so that they can be kept in a file or sent to another process."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from torch import Tensor

from rarefy.formats.terms import Term, parse_spec


def term_tensors(terms: Sequence[Term], prefix: str = "") -> dict[str, Tensor]:
    """``<prefix><index>.<tensor>`` -> stored tensor, where it lies."""
    return {
        f"{prefix}{index}.{name}": buffer.contiguous()
        for index, term in enumerate(terms)
        for name, buffer in term.named_buffers()
    }


def describe_terms(terms: Sequence[Term]) -> str:
    """What ``build_terms`` needs besides the tensors, as JSON."""
    return json.dumps([[list(term.shape), term.spec.model_dump(mode="json")] for term in terms])


def build_terms(description: str, tensors: Mapping[str, Tensor], prefix: str = "") -> list[Term]:
    """The terms again. Raises FormatError or ValueError when the parts do not fit each other."""
    terms = []
    for index, (shape, spec) in enumerate(json.loads(description)):
        lead = f"{prefix}{index}."
        own = {name.removeprefix(lead): tensor for name, tensor in tensors.items() if name.startswith(lead)}
        terms.append(parse_spec(spec).build(tuple(shape), own))
    return terms
