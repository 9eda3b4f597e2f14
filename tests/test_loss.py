"""The two-label loss is the cross-entropy against the soft target of the two shares."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from lsmix.classifiers.loss import pair_loss


@given(count=st.integers(1, 6), classes=st.integers(2, 7), seed=st.integers(0, 999))
def test_it_equals_the_cross_entropy_against_the_soft_target(count, classes, seed):
    draws = torch.Generator().manual_seed(seed)
    logits = 5 * torch.randn(count, classes, generator=draws, dtype=torch.float32)
    label_a, label_b = torch.randint(classes, (2, count), generator=draws)
    share_b = torch.rand(count, generator=draws)
    target = torch.zeros(count, classes)
    rows = torch.arange(count)
    target.index_put_((rows, label_a), 1 - share_b, accumulate=True)
    target.index_put_((rows, label_b), share_b, accumulate=True)
    expected = functional.cross_entropy(logits, target)
    # Two sums of float32 products in another order: some ulps of values up to about 20.
    torch.testing.assert_close(pair_loss(logits, label_a, label_b, share_b), expected, rtol=1e-5, atol=1e-5)


def test_a_share_of_zero_is_the_ordinary_loss_of_the_first_label():
    logits = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    label_a, label_b = torch.tensor([0, 1, 2, 0, 1]), torch.tensor([2, 2, 0, 1, 1])
    expected = functional.cross_entropy(logits, label_a)
    torch.testing.assert_close(pair_loss(logits, label_a, label_b, torch.zeros(5)), expected)


def test_swapping_the_labels_and_the_shares_changes_nothing():
    draws = torch.Generator().manual_seed(1)
    logits, share = torch.randn(8, 4, generator=draws), torch.rand(8, generator=draws)
    label_a, label_b = torch.randint(4, (2, 8), generator=draws)
    # 1 − (1 − s) is s up to one rounding in float32.
    torch.testing.assert_close(
        pair_loss(logits, label_a, label_b, share), pair_loss(logits, label_b, label_a, 1 - share), rtol=1e-6, atol=1e-6
    )
