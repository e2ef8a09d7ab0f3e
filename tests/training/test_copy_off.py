"""Copies that training does not change, in memory that is taken once."""

import torch

from tasks.training.copy_off import CopyOff


def test_a_copy_is_what_the_tensor_was():
    tensors = {
        "a": torch.arange(6.0).reshape(2, 3),
        "turned": torch.arange(6.0).reshape(2, 3).t(),
        "b": torch.arange(5, dtype=torch.bfloat16),
        "step": torch.tensor(3.0),
        "none": torch.empty(0),
    }
    expected = {name: tensor.clone() for name, tensor in tensors.items()}
    copies = CopyOff()(tensors)
    for tensor in tensors.values():
        tensor.add_(1)
    assert copies.keys() == expected.keys()
    for name, copy in copies.items():
        assert copy.dtype == expected[name].dtype
        assert torch.equal(copy, expected[name])
        # As safetensors wants them.
        assert copy.is_contiguous()


def test_the_memory_is_taken_once():
    copy_off, tensor = CopyOff(), torch.zeros(4)
    copy_off.reserve({"a": tensor}, times=3)
    first = copy_off({"a": tensor})["a"]
    second = copy_off({"a": tensor + 1, "b": tensor + 2, "c": tensor + 3})
    assert second["a"].data_ptr() == first.data_ptr()
    assert [copy.tolist() for copy in second.values()] == [[1.0] * 4, [2.0] * 4, [3.0] * 4]


def test_more_than_was_reserved_is_taken_then():
    copy_off = CopyOff()
    copy_off.reserve({"a": torch.zeros(4)})
    assert copy_off({"a": torch.ones(4000)})["a"].tolist() == [1.0] * 4000


def test_a_parameter_that_is_trained_leaves_no_trace_in_its_copy():
    parameter = torch.nn.Parameter(torch.ones(3))
    assert not CopyOff()({"a": parameter})["a"].requires_grad
