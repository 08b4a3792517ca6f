"""Both ways to multiply are one, and the quicker one is taken."""

import pytest
import torch
import torch.nn.functional as F

from vnp_lib.model import linear
from vnp_lib.model.linear import Linear, convolution_is_faster, convolved

pytestmark = pytest.mark.usefixtures("inference_mode")


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("num_tokens", [1, 15, 16, 700])
def test_a_convolution_over_tokens_is_a_linear_layer(num_tokens, num_threads):
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        x, weight, bias = torch.randn(num_tokens, 48), torch.randn(20, 48), torch.randn(20)
        torch.testing.assert_close(
            convolved(x, weight, bias), F.linear(x, weight, bias), rtol=1e-5, atol=1e-5
        )
    finally:
        torch.set_num_threads(before)


def test_a_layer_multiplies_in_the_requested_way(monkeypatch):
    monkeypatch.setattr(linear, "convolved", lambda x, weight, bias: "convolved")
    assert Linear(3, 2, by_convolution=True)(torch.ones(4, 3)) == "convolved"
    assert Linear(3, 2, by_convolution=False)(torch.ones(4, 3)).shape == (4, 2)


@pytest.mark.parametrize(("by_convolution_s", "by_product_s"), [(1.0, 2.0), (2.0, 1.0)])
def test_the_quicker_way_is_found_by_trying(monkeypatch, by_convolution_s, by_product_s):
    durations = iter([by_convolution_s, by_product_s])
    monkeypatch.setattr(linear, "_seconds", lambda work: (work(), next(durations))[1])
    assert convolution_is_faster.__wrapped__() == (by_convolution_s < by_product_s)


def test_without_onednn_there_is_one_way(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert convolution_is_faster.__wrapped__() is False


@pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="torch is built without oneDNN"
)
def test_one_thread_computes_by_onednn_too():
    """torch would rather not: it has a rule for 1 x 1 convolutions with one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            convolved(torch.ones(700, 48), torch.ones(20, 48), torch.ones(20))
    finally:
        torch.set_num_threads(before)
    assert "aten::mkldnn_convolution" in {event.name for event in profile.events()}
