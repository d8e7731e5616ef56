"""The editor: all that training and inference see of a model. It hides which model it is.

    conditioning = editor.encode(params, images, editor.text_inputs(instructions))  # once per distinct record
    v = editor.velocity(params, adapter, x_t, t, conditioning, grid)                # adapter=None: the reference policy
    images = editor.decode(params, x0, grid)

Parameters are held outside: ``params = {"transformer": ..., "text": ..., "autoencoder": ...}``, and for a model whose
modulation was computed beforehand ``"modulation"``.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from cocoedit_jax.flow.packing import pack, unpack
from cocoedit_jax.flow.schedule import flow_match_sigmas
from cocoedit_jax.models.attention import token_axes
from cocoedit_jax.models.autoencoder import Autoencoder
from cocoedit_jax.models.layers import LORA, MODULATION
from cocoedit_jax.models.quantize import quantize_params
from cocoedit_jax.models.text import Instruction, TextSide, TextStates

Array = jax.Array
Params = Any
Size = tuple[int, int]  # (height, width) in pixels


@flax.struct.dataclass
class Conditioning:
    """What the velocity is conditioned on; every leaf leads with the sample axis B."""

    source: Array  # packed latents of the source images, one after another [B, S_src, C p^2]
    text: TextStates
    guidance: Array | None = None  # embedded guidance scale [B]

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


class TransformerShape(Protocol):
    """What FLOP formulas and plans ask of a transformer's configuration."""

    @property
    def hidden(self) -> int: ...

    @property
    def mlp_hidden(self) -> int: ...

    @property
    def num_blocks(self) -> int: ...

    @property
    def num_attention_heads(self) -> int: ...

    @property
    def joint_attention_dim(self) -> int:
        """Width of the text states."""
        ...

    @property
    def pooled_features(self) -> int | None:
        """Width of the pooled text vector, None where the model takes none."""
        ...


@dataclasses.dataclass(frozen=True)
class Editor:
    """The parts that editors share; a model's own class adds ``_apply``.

    Attributes:
        transformer: the velocity network: a linen module with ``config`` (a ``TransformerShape``), ``dtype``,
            ``attention_backend`` and ``init_params(key)``; with ``shares_tokens = True`` if it cuts its tokens by
            ``parallel.share_tokens`` and joins them by ``whole_tokens``.
        autoencoder: pixels <-> latents.
        text: instruction -> states.
        patch: latent cells per token side.
        guidance: embedded guidance scale; None for models without one.
        schedule: keyword arguments of ``flow_match_sigmas``.
        quantize: format of the transformer's kernels in ``params`` (``quantize.FORMATS``); empty: full precision.
    """

    transformer: Any
    autoencoder: Autoencoder
    text: TextSide
    patch: int = 2
    guidance: float | None = None
    schedule: tuple[tuple[str, Any], ...] = ()
    quantize: str = ""

    @property
    def unit(self) -> int:
        """Pixels per token side: what image sizes must be multiples of."""
        return self.autoencoder.factor * self.patch

    def grid(self, height: int, width: int) -> Grid:
        """Latent grid of a ``height`` x ``width`` pixel image. Raises ValueError when the size does not divide."""
        if height % self.unit or width % self.unit:
            raise ValueError(f"image size {height}x{width} px: both sides must be multiples of {self.unit}")
        return Grid(height // self.autoencoder.factor, width // self.autoencoder.factor, self.patch)

    max_sources = 1  # pictures that one edit may start from

    def edit_size(self, pictures: Sequence[Size]) -> Size:
        """Size of an edit of ``pictures`` where none is asked for, as the model's pipeline in diffusers chooses it."""
        raise NotImplementedError

    def source_size(self, picture: Size) -> Size:
        """Size at which the model sees a picture where none is asked for."""
        raise NotImplementedError

    @property
    def token_channels(self) -> int:
        return self.autoencoder.channels * self.patch**2

    def sigmas(self, num_steps: int, grid: Grid) -> np.ndarray:
        """Sampler sigmas ``[num_steps + 1]``, from 1 to 0, shifted for the number of target tokens."""
        return flow_match_sigmas(num_steps, grid.tokens, **dict(self.schedule))

    def check_sigmas(self, sigmas: np.ndarray) -> None:
        """Raises ValueError for sigmas at which ``velocity`` cannot be had; most models take any."""

    def text_inputs(self, instructions: Sequence[Instruction]) -> Any:
        """What ``encode`` needs of ``instructions``: host arrays that lead with B. Raises ValueError for one that is
        not usable."""
        return self.text.inputs(instructions)

    def encode(self, params: Params, images: Array | Sequence[Array], text_inputs: Any) -> Conditioning:
        """Conditioning of ``images`` ``[B, H, W, 3]`` in [0, 1] and the ``text_inputs`` of their instructions.

        Several images per sample (inference) are a sequence of such arrays, whose sizes may differ.
        """
        pictures: Any = images if isinstance(images, list | tuple) else [images]
        latents = [pack(self.autoencoder.encode(params["autoencoder"], picture), self.patch) for picture in pictures]
        guidance = None if self.guidance is None else jnp.full((len(latents[0]),), self.guidance, jnp.float32)
        text = self.text.encode(params["text"], text_inputs)
        return Conditioning(source=jnp.concatenate(latents, axis=1), text=text, guidance=guidance)

    @staticmethod
    def network(params: Params) -> Params:
        """Those of ``params`` that ``velocity`` reads; the same of ``abstract()``."""
        return {name: params[name] for name in ("transformer", MODULATION) if name in params}

    def token_axes(self, conditioning: Conditioning, grid: Grid, mesh: Any) -> tuple[str, ...]:
        """Axes of ``mesh`` that ``velocity`` may be manual in beside those of samples (``attention.token_axes``)."""
        if not getattr(self.transformer, "shares_tokens", False):
            return ()
        lengths = conditioning.text.states.shape[-2], grid.tokens + conditioning.source.shape[-2]
        return token_axes(mesh, self.transformer.attention_backend, lengths)

    def velocity(
        self,
        params: Params,
        adapter: Any,
        x_t: Array,
        t: Array,
        conditioning: Conditioning,
        grid: Grid,
        source_grids: Sequence[Grid] | None = None,
    ) -> Array:
        """Velocity ``noise - x0`` of packed latents ``x_t`` ``[B, S, C p^2]`` at sigma ``t`` ``[B]``, float32.

        Args:
            adapter: a ``lora`` collection with its scale folded in (``lora.fold_scale``), or None for the base model.
            grid: of the target.
            source_grids: of the source images, where there are several or of another size (inference); None: one, of
                the target's ``grid``.
        """
        variables = {"params": params["transformer"]}
        if MODULATION in params:
            variables[MODULATION] = params[MODULATION]
        if adapter is not None:
            variables[LORA] = adapter
        hidden = jnp.concatenate([x_t, conditioning.source.astype(x_t.dtype)], axis=1)
        return self._apply(variables, hidden, t, conditioning, (grid, *(source_grids or (grid,))))

    def _apply(
        self, variables: Any, hidden: Array, t: Array, conditioning: Conditioning, grids: tuple[Grid, ...]
    ) -> Array:
        """The transformer on tokens of images of ``grids``, target first; velocity of the target's."""
        raise NotImplementedError

    def decode(self, params: Params, x0: Array, grid: Grid) -> Array:
        """Images ``[B, H, W, 3]`` in [0, 1] of packed latents ``x0``."""
        return self.autoencoder.decode(params["autoencoder"], unpack(x0, grid.height, grid.width, self.patch))

    def abstract(self) -> Params:
        """Shapes of ``init``'s result, boxed with logical axis names; nothing is computed."""
        return jax.eval_shape(lambda: self.init(jax.random.key(0)))

    def init(self, key: Array) -> Params:
        """Freshly initialised parameters, with logical axis names boxed into every leaf (``flax.linen.unbox``)."""
        text_key, transformer_key, autoencoder_key = jax.random.split(key, 3)
        return {
            "transformer": quantize_params(self.transformer.init_params(transformer_key), self.quantize),
            "text": self.text.init(text_key),
            "autoencoder": self.autoencoder.init(autoencoder_key),
        }
