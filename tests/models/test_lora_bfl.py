import numpy as np
import pytest

from cocoedit_jax.errors import UserError
from cocoedit_jax.models import lora_bfl
from cocoedit_jax.models.lora_bfl import LowRank
from cocoedit_jax.models.lora_names import MODELS

D = 6
FLUX = MODELS["flux"]
LINEAR1 = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
BLOCK = "single_transformer_blocks.1"


def draw(rng, rank, out, alpha=3.0, features=D):
    return LowRank(
        rng.standard_normal((rank, features), np.float32), rng.standard_normal((out, rank), np.float32), alpha
    )


def effect(x):
    return x.scale * x.b @ x.a


def test_fused_rows_and_blocks():
    rng = np.random.default_rng(0)
    q, mlp = draw(rng, 2, D), draw(rng, 2, 4 * D)
    fused = lora_bfl.fuse(FLUX, {f"{BLOCK}.attn.to_q": q, f"{BLOCK}.proj_mlp": mlp})["single_blocks.1.linear1"]
    assert fused.a.shape == (8, D) and fused.b.shape == (7 * D, 8) and fused.alpha == 12
    np.testing.assert_allclose(effect(fused)[:D], effect(q), rtol=1e-5)
    np.testing.assert_array_equal(effect(fused)[D : 3 * D], 0)
    np.testing.assert_allclose(effect(fused)[3 * D :], effect(mlp), rtol=1e-5)


@pytest.mark.parametrize("rank", [1, 3, 4])
@pytest.mark.parametrize("adapted", [(0,), (1, 2), (0, 1, 2), (3,), (0, 3)])
def test_split_undoes_fuse(rank, adapted):
    rng = np.random.default_rng(0)
    names = FLUX.layers_of("single_blocks.1.linear1")
    layers = {names[i]: draw(rng, rank, D if i < 3 else 4 * D) for i in adapted}
    layers[f"{BLOCK}.proj_out"] = draw(rng, rank, D, features=5 * D)
    layers["norm_out.linear"] = draw(rng, rank, 2 * D)
    back = {}
    for name, fused in lora_bfl.fuse(FLUX, layers).items():
        back |= lora_bfl.split(FLUX, name, fused)
    assert back.keys() == layers.keys()
    for name, x in layers.items():
        np.testing.assert_array_equal(back[name].a, x.a)
        np.testing.assert_array_equal(back[name].b, x.b)
        assert back[name].alpha == x.alpha


def test_three_blocks_of_linear1_without_the_fourth():
    """Rank 12 divides by four as well; only three blocks explain the zeros."""
    rng = np.random.default_rng(0)
    parts = [draw(rng, 4, D) for _ in range(3)]
    b = np.zeros((7 * D, 12), np.float32)
    for i, part in enumerate(parts):
        b[i * D : (i + 1) * D, 4 * i : 4 * (i + 1)] = part.b
    split = lora_bfl.split(FLUX, "single_blocks.1.linear1", LowRank(np.concatenate([p.a for p in parts]), b, 9.0))
    assert list(split) == [f"{BLOCK}.attn.to_{x}" for x in "qkv"]
    for part, found in zip(parts, split.values(), strict=True):
        np.testing.assert_array_equal(found.a, part.a)
        np.testing.assert_array_equal(found.b, part.b)
        assert found.alpha == 3 and found.rank == 4


@pytest.mark.parametrize(
    "name, out, rank", [("single_blocks.1.linear1", 7 * D, 4), ("double_blocks.0.img_attn.qkv", 3 * D, 6)]
)
def test_dense_projections_share_a(name, out, rank):
    dense = draw(np.random.default_rng(0), rank, out)
    split = lora_bfl.split(FLUX, name, dense)
    assert tuple(split) == FLUX.layers_of(name)
    assert all(x.a is dense.a and x.alpha == dense.alpha for x in split.values())
    np.testing.assert_array_equal(np.concatenate([x.b for x in split.values()]), dense.b)
    without = dense._replace(b=dense.b * (np.arange(out) >= D)[:, None].astype(np.float32))
    assert len(lora_bfl.split(FLUX, name, without)) == len(split) - 1


def test_untrained_projections_are_kept():
    fresh = LowRank(np.ones((6, D), np.float32), np.zeros((3 * D, 6), np.float32), 6.0)
    nothing = fresh._replace(a=fresh.a * 0)
    for x in (fresh, nothing):
        assert len(lora_bfl.split(FLUX, "double_blocks.0.img_attn.qkv", x)) == 3


def test_order_of_the_final_modulation():
    """diffusers' rows are scale | shift, the original's shift | scale."""
    scale_shift = LowRank(np.ones((1, D), np.float32), np.arange(2 * D, dtype=np.float32)[:, None], 1.0)
    fused = lora_bfl.fuse(FLUX, {"norm_out.linear": scale_shift})["final_layer.adaLN_modulation.1"]
    np.testing.assert_array_equal(fused.b[:, 0], [*range(D, 2 * D), *range(D)])
    for name in ("norm_out.linear", "norm_out_linear"):
        np.testing.assert_array_equal(lora_bfl.split(FLUX, name, scale_shift)["norm_out.linear"].b, scale_shift.b)


def test_what_does_not_fit():
    rng = np.random.default_rng(0)
    for name in ("double_blocks.0.img_attn.qkv", "single_blocks.0.linear1"):
        with pytest.raises(ValueError, match=f"{2 * D} output rows for {D} input columns"):
            lora_bfl.split(FLUX, name, draw(rng, 2, 2 * D))
    with pytest.raises(UserError, match="no layers of FLUX: a.to_q, transformer_blocks.0.img_mlp"):
        lora_bfl.fuse(FLUX, {"transformer_blocks.0.img_mlp": draw(rng, 2, D), "a.to_q": draw(rng, 2, D)})
    query, key = draw(rng, 2, D), draw(rng, 2, D + 1)
    with pytest.raises(UserError, match="double_blocks.0.img_attn.qkv: shapes of transformer_blocks.0.attn.to_k"):
        lora_bfl.fuse(FLUX, {"transformer_blocks.0.attn.to_q": query, "transformer_blocks.0.attn.to_k": key})
