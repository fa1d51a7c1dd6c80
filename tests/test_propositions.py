"""Propositions 1 and 2 of the paper (arXiv 2606.22600), exactly, on small distributions.

Prop. 1: q* = student^(1-alpha) teacher^alpha / Z solves min KL(q || teacher) in the trust region
KL(q || student) <= rho; rho = alpha psi'(alpha) - psi(alpha), psi = log E_student[ratio^alpha].
Prop. 2: expectations under q* are student expectations reweighted by that ratio; its causal part,
normalised position by position, is the prefix ratio of Eq. 44-46.
"""

import itertools

import numpy as np
import pytest

RNG = np.random.default_rng(0)
ALPHAS = np.linspace(0.02, 0.98, 25)


def distribution(size):
    return RNG.dirichlet(np.full(size, 0.7))


def kl(p, q):
    return float((p * np.log(p / q)).sum())


def optimum(student, teacher, alpha):
    weight = student ** (1 - alpha) * teacher**alpha  # Eq. 8
    return weight / weight.sum()


def psi(student, teacher, alpha):
    return np.log((student * (teacher / student) ** alpha).sum())


def step_size(student, teacher, alpha, h=1e-5):
    """rho(alpha) of Eq. 25-33, the derivative of psi taken numerically."""
    slope = (psi(student, teacher, alpha + h) - psi(student, teacher, alpha - h)) / (2 * h)
    return alpha * slope - psi(student, teacher, alpha)


@pytest.mark.parametrize("size", [2, 5, 40])
def test_the_optimum_lies_on_the_trust_region_and_alpha_grows_with_it(size):
    student, teacher = distribution(size), distribution(size)
    radii = [kl(optimum(student, teacher, a), student) for a in ALPHAS]
    expected = [step_size(student, teacher, a) for a in ALPHAS]
    np.testing.assert_allclose(radii, expected, rtol=1e-5, atol=1e-8)
    assert np.all(np.diff(radii) > 0)
    assert 0 < radii[0] and radii[-1] < kl(teacher, student)


@pytest.mark.parametrize("size", [2, 5, 40])
def test_no_distribution_within_the_trust_region_is_closer_to_the_teacher(size):
    student, teacher = distribution(size), distribution(size)
    for alpha in (0.1, 0.5, 0.9):
        best = optimum(student, teacher, alpha)
        rho, reached = kl(best, student), kl(best, teacher)
        tried = 0
        for scale in np.repeat([1e-3, 1e-2, 0.1, 1.0], 500):  # neighbours near and far
            q = best * np.exp(scale * RNG.normal(size=size))
            q /= q.sum()
            if kl(q, student) <= rho:
                tried += 1
                assert kl(q, teacher) >= reached - 1e-12
        assert tried > 50


def sequences(length, symbols):
    """All sequences with their probability under a random autoregressive model."""
    table = {
        prefix: distribution(symbols)
        for t in range(length)
        for prefix in itertools.product(range(symbols), repeat=t)
    }
    every = list(itertools.product(range(symbols), repeat=length))
    return every, np.array([[table[y[:t]][y[t]] for t in range(length)] for y in every])


def test_expectations_under_the_optimum_are_reweighted_student_expectations():
    """Eq. 40 and 42: the sequence-level form, exact by enumeration."""
    (_, student), (_, teacher) = sequences(4, 3), sequences(4, 3)
    p, q = student.prod(1), teacher.prod(1)
    for alpha in (0.2, 0.7):
        best = optimum(p, q, alpha)
        ratio = (q / p) ** alpha
        normaliser = (p * ratio).sum()
        token_terms = np.log(student / teacher).sum(1)  # Eq. 41: the log ratio is a sum over tokens
        left = kl(best, q)
        right = kl(best, p) + (p * ratio * token_terms).sum() / normaliser  # Eq. 10
        assert left == pytest.approx(right, rel=1e-12)


def test_the_prefix_ratio_has_mean_one_at_every_position():
    """Eq. 44-46: r~_1 = 1, and E_student[r~_t] = 1 by its normaliser; without it, it drifts."""
    (_, student), (_, teacher) = sequences(5, 3), sequences(5, 3)
    p = student.prod(1)
    log_ratio = np.log(teacher / student)
    prefix = np.cumsum(log_ratio, 1) - log_ratio  # exclusive: y_<t
    for alpha in (0.3, 1.0):
        r = np.exp(alpha * prefix)
        normaliser = p @ r
        assert normaliser[0] == pytest.approx(1.0)
        np.testing.assert_allclose(p @ (r / normaliser), 1.0)
        if alpha < 1:
            assert np.all(np.diff(normaliser) < 0)  # E[r^alpha] < 1 and falling: drift accumulates
        else:
            np.testing.assert_allclose(normaliser, 1.0)  # alpha = 1 is the exact change of measure
