"""Every number that a network computes with is in its hash."""

import pytest
import torch
from torch import nn

from pcr_export.errors import PcrExportError
from pcr_export.models.hash_weights import hash_weights

BUFFERS = {
    "scalar": torch.tensor(3),  # as BatchNorm's num_batches_tracked
    "flag": torch.tensor([True, False]),
    "brain": torch.ones(3, dtype=torch.bfloat16),
    "rotation": torch.view_as_complex(torch.ones(4, 2)).conj(),
    "strided": torch.arange(12.0).reshape(3, 4).T,
    "empty": torch.zeros(0),
}


def network(**changes) -> nn.Module:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    for name, tensor in {**BUFFERS, **changes}.items():
        module.register_buffer(name, tensor, persistent=name != "brain")
    return module


def test_equal_networks_have_one_hash():
    assert hash_weights(network()) == hash_weights(network())
    assert hash_weights(network(strided=BUFFERS["strided"].contiguous())) == hash_weights(network())


@pytest.mark.parametrize(
    "change",
    [
        {"scalar": torch.tensor(4)},
        {"flag": torch.tensor([True, True])},
        {"brain": torch.zeros(3, dtype=torch.bfloat16)},  # in no state dict
        {"rotation": torch.view_as_complex(torch.ones(4, 2))},
        {"strided": torch.arange(12.0).reshape(3, 4).T.reshape(2, 6)},  # the same bytes
        {"empty": torch.zeros(0, 2)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_another_network_has_another_hash(change):
    assert hash_weights(network(**change)) != hash_weights(network())


def test_a_network_without_weights_is_named():
    with torch.device("meta"), pytest.raises(PcrExportError, match=r"0\.bias is on the meta device"):
        hash_weights(nn.Sequential(nn.Linear(2, 3)))
