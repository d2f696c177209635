import pytest
import torch

from anystep import registry
from anystep.errors import UserError
from anystep.networks import NetworkConfig
from anystep.networks._embed import sinusoid, step_level
from anystep.networks.dit import DiTConfig, positions
from conftest import SMALL, small_net


def inputs(shape, n=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, *shape, generator=generator)
    t = torch.rand(n, generator=generator)
    d = torch.exp2(-torch.arange(n).float())
    return x, t, d, torch.arange(n) % 4


@pytest.mark.parametrize("kind", SMALL)
class TestEveryNetwork:
    def test_starts_at_zero(self, kind):
        config, shape = SMALL[kind]
        assert config.build(shape, 4)(*inputs(shape)).abs().max() == 0

    def test_gradient_reaches_every_parameter(self, kind):
        net, shape = small_net(kind)
        net(*inputs(shape)).square().sum().backward()
        for name, parameter in net.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name

    def test_every_input_matters(self, kind):
        net, shape = small_net(kind)
        x, t, d, cond = inputs(shape)
        base = net(x, t, d, cond)
        for other in (
            net(x + 0.1, t, d, cond),
            net(x, t + 0.1, d, cond),
            net(x, t, d / 2, cond),
            net(x, t, d, (cond + 1) % 4),
        ):
            assert (other - base).flatten(1).abs().amax(1).min() > 1e-4

    def test_zero_and_the_finest_step_share_a_level(self, kind):
        net, shape = small_net(kind)
        x, t, d, cond = inputs(shape)
        outputs = [net(x, t, torch.full_like(d, value), cond) for value in (0, 1 / 256, 1 / 128)]
        assert torch.equal(outputs[0], outputs[2]) and torch.equal(outputs[1], outputs[2])
        assert not torch.equal(outputs[2], net(x, t, torch.full_like(d, 1 / 64), cond))

    def test_no_condition_is_the_null_label(self, kind):
        net, shape = small_net(kind)
        x, t, d, cond = inputs(shape)
        assert net.null_label == 4
        assert torch.equal(net(x, t, d, None), net(x, t, d, torch.full_like(cond, 4)))

    def test_unconditional(self, kind):
        net, shape = small_net(kind, num_classes=0)
        x, t, d, _ = inputs(shape)
        assert net.null_label is None
        assert net(x, t, d, None).shape == x.shape

    def test_rows_do_not_mix(self, kind):
        net, shape = small_net(kind)
        x, t, d, cond = inputs(shape)
        alone = net(x[2:3], t[2:3], d[2:3], cond[2:3])
        torch.testing.assert_close(net(x, t, d, cond)[2:3], alone, atol=1e-5, rtol=1e-5)

    def test_config_goes_through_json(self, kind):
        config, _ = SMALL[kind]
        assert registry.from_json(NetworkConfig, registry.to_json(config)) == config

    def test_bfloat16_autocast_is_close_and_returns_float32(self, kind):
        net, shape = small_net(kind)
        x, t, d, cond = inputs(shape)
        with torch.autocast("cpu", torch.bfloat16):
            low = net(x, t, d, cond)
        full = net(x, t, d, cond)
        assert low.dtype == torch.float32
        assert (low - full).norm() < 0.03 * full.norm()


def test_the_wrong_kind_of_data_is_refused():
    with pytest.raises(UserError, match="patch 2 does not divide"):
        DiTConfig(width=32, heads=2).build((1, 28, 27), 0)
    with pytest.raises(UserError, match="images"):
        DiTConfig().build((5,), 0)
    with pytest.raises(UserError, match="vectors"):
        SMALL["mlp"][0].build((1, 8, 8), 0)
    with pytest.raises(UserError, match="heads"):
        DiTConfig(width=36, heads=5).build((1, 8, 8), 0)
    net, shape = small_net("dit")
    x, t, d, cond = inputs(shape)
    with pytest.raises(UserError, match="takes"):
        net(x.transpose(2, 3), t, d, cond)


@pytest.mark.parametrize(
    ("size", "classes", "millions"),
    [("B/2", 1000, 131.09), ("B/2", 1, 130.32), ("XL/2", 1000, 676.44)],
)
def test_sizes_are_those_of_the_paper(size, classes, millions):
    with torch.device("meta"):
        net = DiTConfig.size(size).build((4, 32, 32), classes)
    count = sum(p.numel() for p in net.parameters())
    assert round(count / 1e6, 2) == millions


def test_unknown_size():
    with pytest.raises(UserError, match="S/2"):
        DiTConfig.size("H/2")


def test_positions_tell_rows_from_columns():
    grid = positions((2, 3), 16).reshape(2, 3, 16)
    assert torch.equal(grid[0, :, 8:], grid[1, :, 8:].roll(0)) is False
    assert torch.equal(grid[:, 0, :8], grid[:, 0, :8][[0, 0]])  # columns do not see the row
    assert torch.equal(grid[0, :, 8:], grid[0, [0, 0, 0], 8:])  # rows do not see the column
    assert len(grid.reshape(6, 16).unique(dim=0)) == 6


def test_sinusoid_separates_small_times():
    a, b = sinusoid(torch.tensor([0.5, 0.501]) * 1000)
    assert (a - b).abs().max() > 0.5


def test_step_level():
    d = torch.tensor([1, 0.5, 1 / 64, 1 / 128, 1 / 1000, 0])
    assert step_level(d, 128).tolist() == [0, 1, 6, 7, 7, 7]
    assert step_level(d, 16).tolist() == [0, 1, 4, 4, 4, 4]
