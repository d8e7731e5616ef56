"""Checkpoints: all that the next step depends on, so that a resumed run equals one that never stopped.

Arrays go through Orbax (written beside, then renamed: a killed run leaves the last whole checkpoint), the rest is JSON.
"""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from cocoedit_jax.errors import UserError
from cocoedit_jax.sharding import processes
from cocoedit_jax.train.run_folder import check_seen
from cocoedit_jax.train.step import TrainState


class Checkpoints:
    """The checkpoints of one run, in ``RUN/checkpoints/STEP``; each process writes its part.

    Raises:
        UserError: in all processes, when one does not see the folder that process 0 has claimed.
    """

    def __init__(self, run_dir: Path, keep: int):
        processes.gather("see run folder", lambda: None if processes.is_first() else check_seen(run_dir))
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
        self._manager = ocp.CheckpointManager((run_dir / "checkpoints").resolve(), options=options)

    def save(self, state: TrainState, progress: dict[str, Any]) -> None:
        """Saves in the background; ``progress`` is JSON: bans, data position, seed."""
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        self._manager.save(
            step, args=ocp.args.Composite(state=ocp.args.StandardSave(state), progress=ocp.args.JsonSave(progress))
        )

    @property
    def latest(self) -> int | None:
        """Step of the newest whole checkpoint."""
        return self._manager.latest_step()

    def restore(self, template: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The newest checkpoint, in the shapes and shardings of ``template``.

        Raises:
            UserError: there is none, or it was made by another model or LoRA shape.
        """
        step = self.latest
        if step is None:
            raise UserError(f"{self._manager.directory}: no checkpoint to resume from; start without --resume")
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, template)
        try:
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract), progress=ocp.args.JsonRestore()),
            )
        except ValueError as error:
            raise UserError(f"{self._manager.directory}/{step}: does not fit this configuration ({error})") from error
        return restored["state"], restored["progress"]

    def wait(self) -> None:
        """Returns when everything saved is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()
