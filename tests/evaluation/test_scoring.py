from __future__ import annotations

import math

import hypothesis.strategies as st
import numpy as np
import pytest
import scipy.special
import torch
from hypothesis import given

from rarefy.evaluation.divergence import first_max, kl_, top1
from rarefy.evaluation.perplexity import perplexity, token_nll
from rarefy.evaluation.scoring import Scorer

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def oracle(
    logits: torch.Tensor, targets: torch.Tensor, reference: torch.Tensor
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The three metrics in float64 from their definitions."""
    candidate, expected = logits.double().numpy(), reference.double().numpy()
    log_q, log_p = scipy.special.log_softmax(candidate, -1), scipy.special.log_softmax(expected, -1)
    nll = -np.take_along_axis(log_q, targets.numpy()[:, None], -1)[:, 0]
    kl = scipy.special.rel_entr(np.exp(log_p), np.exp(log_q)).sum(-1)
    return nll, kl, candidate.argmax(-1) == expected.argmax(-1)


def random_case(rows: int, vocab: int, dtype: torch.dtype, scale: float = 4.0) -> tuple[torch.Tensor, ...]:
    reference = scale * torch.randn(rows, vocab)
    logits = reference + 0.7 * torch.randn(rows, vocab)
    return logits.to(dtype), torch.randint(vocab, (rows,)), reference.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "vocab"), [(1, 2), (7, 1), (33, 257), (5, 5003)])
def test_scores_equal_scipy_in_float64(rows: int, vocab: int, dtype: torch.dtype) -> None:
    logits, targets, reference = random_case(rows, vocab, dtype)
    nll, kl, agree = oracle(logits, targets, reference)
    scores = Scorer().score(logits, targets, reference)
    np.testing.assert_allclose(scores.nll.numpy(), nll, rtol=1e-5, atol=3e-6)
    np.testing.assert_allclose(scores.kl.numpy(), kl, rtol=1e-5, atol=3e-6)
    np.testing.assert_array_equal(scores.agree.numpy(), agree)
    assert scores.nll.dtype == scores.kl.dtype == torch.float32


@given(rows=st.integers(1, 20), chunk=st.integers(1, 25), vocab=st.integers(1, 40), seed=st.integers(0, 99))
def test_chunks_do_not_change_scores(rows: int, chunk: int, vocab: int, seed: int) -> None:
    torch.manual_seed(seed)
    logits, targets, reference = random_case(rows, vocab, torch.float32)
    whole = Scorer(rows).score(logits, targets, reference)
    for scores in (Scorer(chunk).score(logits, targets, reference), Scorer().score(logits, targets, reference)):
        for one, other in zip(scores, whole, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_equal_logits_have_no_divergence() -> None:
    for dtype in DTYPES:
        logits, targets, _ = random_case(40, 3001, dtype, scale=20.0)
        scores = Scorer().score(logits, targets, logits.clone())
        assert not scores.kl.any()
        assert scores.agree.all()


def test_divergence_is_not_negative_beyond_rounding() -> None:
    logits = 10 * torch.randn(64, 4096)
    targets = torch.zeros(64, dtype=torch.long)
    for noise in (1e-6, 1e-3, 1.0, 30.0):
        kl = Scorer().score(logits + noise * torch.randn_like(logits), targets, logits).kl
        assert kl.min() > -1e-5
        assert kl.double().mean() > -1e-6


def test_extreme_logits_stay_finite() -> None:
    reference = torch.tensor([[3e4, -3e4, 0.0], [-1e30, 0.0, 1.0]])
    logits = torch.tensor([[3e4, 0.0, -3e4], [-1e30, 1.0, 0.0]])
    scores = Scorer().score(logits, torch.tensor([0, 1]), reference)
    nll, kl, agree = oracle(logits, torch.tensor([0, 1]), reference)
    np.testing.assert_allclose(scores.nll.numpy(), nll, atol=1e-6)
    np.testing.assert_allclose(scores.kl.numpy(), kl, atol=1e-6)
    assert scores.agree.tolist() == agree.tolist() == [True, False]


def test_inputs_are_left_alone_and_buffers_may_be_shared() -> None:
    scorer = Scorer(4)
    cases = [random_case(10, 50, torch.float32), random_case(3, 50, torch.bfloat16), random_case(9, 21, torch.float32)]
    for logits, targets, reference in cases:
        before = logits.clone(), reference.clone()
        scores = scorer.score(logits, targets, reference)
        assert torch.equal(logits, before[0]) and torch.equal(reference, before[1])
        np.testing.assert_allclose(scores.kl.numpy(), oracle(logits, targets, reference)[1], rtol=1e-5, atol=3e-6)


def test_without_reference_there_is_only_the_likelihood() -> None:
    logits, targets, reference = random_case(6, 30, torch.float32)
    alone = Scorer().score(logits, targets)
    assert alone.kl is None and alone.agree is None
    assert torch.equal(alone.nll, Scorer().score(logits, targets, reference).nll)


def test_views_and_gradients_are_accepted() -> None:
    logits, targets, reference = random_case(12, 30, torch.float32)
    strided = torch.stack([logits, logits], -1).requires_grad_()[..., 0]
    torch.testing.assert_close(
        Scorer().score(strided, targets, reference).kl, Scorer().score(logits, targets, reference).kl
    )


def test_top1_counts_the_first_of_equals() -> None:
    assert top1(torch.tensor([[1.0, 2.0, 2.0]]), torch.tensor([[0.0, 3.0, 3.0]])).tolist() == [True]
    assert top1(torch.tensor([[1.0, 2.0, 2.0]]), torch.tensor([[0.0, 3.0, 4.0]])).tolist() == [False]


@given(rows=st.integers(1, 4), vocab=st.integers(1, 1100), values=st.integers(1, 40), seed=st.integers(0, 999))
def test_first_max_is_numpys_argmax_also_among_ties(rows: int, vocab: int, values: int, seed: int) -> None:
    scores = np.random.default_rng(seed).integers(values, size=(rows, vocab)).astype(np.float32)
    np.testing.assert_array_equal(first_max(torch.from_numpy(scores)).numpy(), scores.argmax(-1))


def test_words_of_the_formulas() -> None:
    log_probs = torch.log(torch.tensor([[0.5, 0.25, 0.25]]))
    assert token_nll(log_probs, torch.tensor([1])).item() == pytest.approx(math.log(4))
    uniform = torch.full((1, 3), 1 / 3).log()
    assert kl_(log_probs.clone(), uniform.clone()).item() == pytest.approx(math.log(3) - 1.5 * math.log(2))
    assert kl_(uniform.clone(), log_probs.clone()).item() == pytest.approx(5 / 3 * math.log(2) - math.log(3))
    assert perplexity(3 * math.log(7), 3) == pytest.approx(7)
    assert perplexity(1e6, 1) == math.inf
