"""Soft targets weight two labels by their shares."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from lsmix.data.loaders.batch import soft_target


@given(count=st.integers(1, 6), classes=st.integers(2, 7), seed=st.integers(0, 999))
def test_cross_entropy_with_a_soft_target_is_the_weighted_loss_of_both_labels(count, classes, seed):
    draws = torch.Generator().manual_seed(seed)
    logits = 5 * torch.randn(count, classes, generator=draws)
    label_a, label_b = torch.randint(classes, (2, count), generator=draws)
    share_b = torch.rand(count, generator=draws)
    target = soft_target(label_a, label_b, share_b, classes)
    both = [functional.cross_entropy(logits, label, reduction="none") for label in (label_a, label_b)]
    expected = ((1 - share_b) * both[0] + share_b * both[1]).mean()
    # Sums of float32 products in different orders: a few ulps of values up to about 20.
    torch.testing.assert_close(functional.cross_entropy(logits, target), expected, rtol=1e-5, atol=1e-5)


def test_a_share_of_zero_gives_the_first_label():
    target = soft_target(torch.tensor([0, 2]), torch.tensor([1, 0]), torch.zeros(2), 3)
    assert torch.equal(target, torch.eye(3)[[0, 2]])


def test_swapping_the_labels_and_the_shares_changes_nothing():
    draws = torch.Generator().manual_seed(1)
    label_a, label_b = torch.randint(4, (2, 8), generator=draws)
    share = torch.rand(8, generator=draws)
    # 1 − (1 − s) is s up to one rounding in float32.
    torch.testing.assert_close(
        soft_target(label_a, label_b, share, 4), soft_target(label_b, label_a, 1 - share, 4), rtol=1e-6, atol=1e-6
    )
