"""The editor: all that training and inference see of a model. It hides which model it is.

    conditioning = editor.encode(params, images, editor.text_inputs(prompts))  # once per distinct record
    v = editor.velocity(params, adapter, x_t, t, conditioning)                 # adapter=None: the reference policy
    images = editor.decode(params, x0, grid)

Parameters are held outside: ``params = {"transformer": ..., "text": ..., "autoencoder": ...}``.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from cocoedit_jax.flow.packing import pack, position_ids, unpack
from cocoedit_jax.flow.schedule import flow_match_sigmas
from cocoedit_jax.models.autoencoder import Autoencoder
from cocoedit_jax.models.flux import FluxTransformer
from cocoedit_jax.models.layers import LORA
from cocoedit_jax.models.text import TextSide

Array = jax.Array
Params = Any


@flax.struct.dataclass
class Conditioning:
    """What the velocity is conditioned on; every leaf leads with the sample axis B."""

    source: Array  # packed latents of the source image [B, S_src, C p^2]
    text: Array  # encoder states [B, S_txt, D_txt]
    pooled: Array  # pooled text [B, D_pool]
    guidance: Array  # embedded guidance scale [B]

    def take(self, index: Array) -> "Conditioning":
        """The rows ``index`` of every leaf."""
        return jax.tree.map(lambda x: x[index], self)


@dataclasses.dataclass(frozen=True)
class Grid:
    """Latent grid of an image, in latent cells; ``tokens`` counts packed tokens."""

    height: int
    width: int
    patch: int

    @property
    def token_shape(self) -> tuple[int, int]:
        return self.height // self.patch, self.width // self.patch

    @property
    def tokens(self) -> int:
        return self.token_shape[0] * self.token_shape[1]


@dataclasses.dataclass(frozen=True)
class KontextEditor:
    """FLUX.1 Kontext conditioning: source tokens are appended to the target's, text ids are zero (diffusers'
    FluxKontextPipeline). The transformer is the same class at every size.

    Attributes:
        transformer: the velocity network.
        autoencoder: pixels <-> latents.
        text: prompt -> states and pooled vector.
        patch: latent cells per token side (2 for FLUX).
        guidance: embedded guidance scale; ignored by models without guidance embedding.
        schedule: keyword arguments of ``flow_match_sigmas``.
    """

    transformer: FluxTransformer
    autoencoder: Autoencoder
    text: TextSide
    patch: int = 2
    guidance: float = 2.5
    schedule: tuple[tuple[str, Any], ...] = ()

    def grid(self, height: int, width: int) -> Grid:
        """Latent grid of a ``height`` x ``width`` pixel image. Raises ValueError when the size does not divide."""
        unit = self.autoencoder.factor * self.patch
        if height % unit or width % unit:
            raise ValueError(f"image size {height}x{width} px: both sides must be multiples of {unit}")
        return Grid(height // self.autoencoder.factor, width // self.autoencoder.factor, self.patch)

    @property
    def token_channels(self) -> int:
        return self.autoencoder.channels * self.patch**2

    def sigmas(self, num_steps: int, grid: Grid) -> np.ndarray:
        """Sampler sigmas ``[num_steps + 1]``, from 1 to 0, shifted for the number of target tokens."""
        return flow_match_sigmas(num_steps, grid.tokens, **dict(self.schedule))

    def text_inputs(self, prompts: Sequence[str]) -> Any:
        """What ``encode`` needs of ``prompts``: host arrays that lead with B. Raises ValueError for an unusable one."""
        return self.text.inputs(prompts)

    def encode(self, params: Params, images: Array, text_inputs: Any) -> Conditioning:
        """Conditioning of ``images`` ``[B, H, W, 3]`` in [0, 1] and the ``text_inputs`` of their prompts."""
        text, pooled = self.text.encode(params["text"], text_inputs)
        latents = self.autoencoder.encode(params["autoencoder"], images)
        guidance = jnp.full((images.shape[0],), self.guidance, jnp.float32)
        return Conditioning(source=pack(latents, self.patch), text=text, pooled=pooled, guidance=guidance)

    def velocity(
        self,
        params: Params,
        adapter: Any,
        x_t: Array,
        t: Array,
        conditioning: Conditioning,
        grid: Grid,
        source_grid: Grid | None = None,
    ) -> Array:
        """Velocity ``noise - x0`` of packed latents ``x_t`` ``[B, S, C p^2]`` at sigma ``t`` ``[B]``, float32.

        Args:
            adapter: a ``lora`` collection with its scale folded in (``lora.fold_scale``), or None for the base model.
            grid: of the target.
            source_grid: of the source image, where it has another size (inference); None = ``grid``.
        """
        variables = {"params": params["transformer"]}
        if adapter is not None:
            variables[LORA] = adapter
        # Kontext: the target has index 0, the source image index 1, and both count rows and columns from zero.
        ids = self._ids(grid, source_grid or grid, conditioning.text.shape[1])
        hidden = jnp.concatenate([x_t, conditioning.source.astype(x_t.dtype)], axis=1)
        velocity: Any = self.transformer.apply(
            variables, hidden, conditioning.text, conditioning.pooled, t, conditioning.guidance, ids, grid.tokens
        )
        return velocity

    @functools.lru_cache(maxsize=8)  # noqa: B019 - editors live as long as the program
    def _ids(self, grid: Grid, source_grid: Grid, num_text: int) -> np.ndarray:
        image_ids = [position_ids(*g.token_shape, index) for index, g in enumerate((grid, source_grid))]
        return np.concatenate([np.zeros((num_text, 3), np.int32), *image_ids])

    def decode(self, params: Params, x0: Array, grid: Grid) -> Array:
        """Images ``[B, H, W, 3]`` in [0, 1] of packed latents ``x0``."""
        return self.autoencoder.decode(params["autoencoder"], unpack(x0, grid.height, grid.width, self.patch))

    def abstract(self) -> Params:
        """Shapes of ``init``'s result, boxed with logical axis names; nothing is computed."""
        return jax.eval_shape(self.init, jax.random.key(0))

    def init(self, key: Array) -> Params:
        """Freshly initialised parameters, with logical axis names boxed into every leaf (``flax.linen.unbox``)."""
        text_key, transformer_key, autoencoder_key = jax.random.split(key, 3)
        shape, grid = self.transformer.config, Grid(self.patch, self.patch, self.patch)
        one = jnp.zeros((1,))
        transformer = self.transformer.init(
            transformer_key,
            jnp.zeros((1, 2, self.token_channels)),  # a target and a source token
            jnp.zeros((1, 1, shape.joint_attention_dim)),
            jnp.zeros((1, shape.pooled_projection_dim)),
            one,
            one,
            self._ids(grid, grid, 1),
            1,
        )
        return {
            "transformer": transformer["params"],
            "text": self.text.init(text_key),
            "autoencoder": self.autoencoder.init(autoencoder_key),
        }
