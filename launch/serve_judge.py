"""Serves a judge: Qwen2.5-VL behind OpenAI's chat completions, with log-probabilities.

    python -m launch.serve_judge --model=Qwen/Qwen2.5-VL-7B-Instruct
    python -m launch.serve_judge --fake                    # answers by rule, no weights: to try things out

The model is a folder or its name in the Hugging Face cache; nothing is downloaded. It listens to this machine alone;
for others give --host and a key (--key_env or --key_file). Ctrl-C or SIGTERM finishes what is queued, then ends.
    pip install 'cocoedit-jax[bridge,judge]'
"""

from absl import flags

from cocoedit_jax.errors import UserError
from cocoedit_jax.rewards.api_key import read_key
from launch import command

_MODEL = flags.DEFINE_string("model", None, "Model folder, or a repository name in the Hugging Face cache.")
_FAKE = flags.DEFINE_bool("fake", False, "Answer by a rule on the pixels, without weights.")
_FAKE_DELAY = flags.DEFINE_float("fake_delay", 0.0, "Seconds that a batch of the fake takes.", lower_bound=0.0)
_NAME = flags.DEFINE_string("name", None, "Name that requests must give; default: --model as it was given, or fake.")
_HOST = flags.DEFINE_string("host", "127.0.0.1", "Address to listen at.")
_PORT = flags.DEFINE_integer("port", 8000, "Port to listen at; 0: a free one.", lower_bound=0, upper_bound=65535)
_KEY_ENV = flags.DEFINE_string("key_env", "", "Environment variable with the key that requests must bear.")
_KEY_FILE = flags.DEFINE_string("key_file", "", "File with that key.")
_DEVICE = flags.DEFINE_string("device", None, "cpu, cuda or cuda:1; default: the GPU if there is one.")
_DTYPE = flags.DEFINE_enum("dtype", None, ["bfloat16", "float32"], "Default: bfloat16 on a GPU, float32 on a CPU.")
_MAX_BATCH = flags.DEFINE_integer("max_batch", 16, "Requests computed at once.", lower_bound=1)
_MAX_WAIT = flags.DEFINE_float("max_wait_ms", 10.0, "Milliseconds that a batch waits to fill.", lower_bound=0.0)
_BATCH_TOKENS = flags.DEFINE_integer("max_batch_tokens", 65536, "Tokens of a batch with padding.", lower_bound=1)
_QUEUE = flags.DEFINE_integer("max_queue", 256, "Requests taken in; one more is answered 429.", lower_bound=1)
_QUEUE_TOKENS = flags.DEFINE_integer("max_queue_tokens", 2**18, "Tokens that wait; one more: 429.", lower_bound=1)
_CONNECTIONS = flags.DEFINE_integer("max_connections", 512, "Open connections.", lower_bound=1)
_BODY = flags.DEFINE_float("max_body_mb", 24.0, "Megabytes (2^20) of a request.", lower_bound=0.001)
_IMAGE = flags.DEFINE_float("max_image_mb", 12.0, "Megabytes (2^20) of a picture's file.", lower_bound=0.001)
_PIXELS = flags.DEFINE_integer("max_pixels", 2**22, "Pixels of a picture.", lower_bound=1)
_IMAGES = flags.DEFINE_integer("max_images", 8, "Pictures of a request.", lower_bound=0)
_PROMPT_TOKENS = flags.DEFINE_integer("max_prompt_tokens", 16384, "Tokens of a prompt, with pictures.", lower_bound=1)
_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 512, "Tokens of an answer.", lower_bound=1)
_HEAD_S = flags.DEFINE_float("head_seconds", 10.0, "For the head of a request.", lower_bound=0.1)
_BODY_S = flags.DEFINE_float("body_seconds", 30.0, "For the body of a request.", lower_bound=0.1)
_REQUEST_S = flags.DEFINE_float("request_seconds", 120.0, "From then to the reply.", lower_bound=0.1)
_DRAIN_S = flags.DEFINE_integer("drain_seconds", 60, "To finish what is queued when told to end.", lower_bound=1)


def main(argv: list[str]) -> None:
    if _FAKE.value == bool(_MODEL.value):
        raise UserError("--model and --fake: give one of them")
    try:
        from torch_bridge.judge_server.app import AppSettings
        from torch_bridge.judge_server.batching import BatchLimits
        from torch_bridge.judge_server.connections import ConnectionLimits
        from torch_bridge.judge_server.protocol import Limits
        from torch_bridge.judge_server.serving import Address, ServeOptions, serve
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} cannot be imported; install with: pip install 'cocoedit-jax[judge]'") from error

    megabyte = 2**20
    settings = AppSettings(
        name=_NAME.value or _MODEL.value or "fake",
        token=read_key(_KEY_ENV.value, _KEY_FILE.value),
        limits=Limits(
            body_bytes=int(_BODY.value * megabyte),
            image_bytes=int(_IMAGE.value * megabyte),
            image_pixels=_PIXELS.value,
            images=_IMAGES.value,
            prompt_tokens=_PROMPT_TOKENS.value,
            new_tokens=_NEW_TOKENS.value,
        ),
        batches=BatchLimits(
            _MAX_BATCH.value, _MAX_WAIT.value / 1000, _BATCH_TOKENS.value, _QUEUE.value, _QUEUE_TOKENS.value
        ),
        body_seconds=_BODY_S.value,
        request_seconds=_REQUEST_S.value,
        root=_MODEL.value or "fake",
    )
    cycle_seconds = _BODY_S.value + _REQUEST_S.value + 30.0  # and time to send the reply
    connections = ConnectionLimits(_CONNECTIONS.value, _HEAD_S.value, cycle_seconds=cycle_seconds)
    options = ServeOptions(Address(_HOST.value, _PORT.value), connections, _DRAIN_S.value)
    options.address.check(settings.token)
    if _FAKE.value:
        from torch_bridge.judge_server.fake import FakeModel

        serve(FakeModel(_FAKE_DELAY.value), settings, options)
    else:
        from cocoedit_jax.models.hub import resolve_model
        from torch_bridge.judge_server.qwen import QwenModel

        serve(QwenModel(resolve_model(_MODEL.value or ""), dtype=_DTYPE.value, device=_DEVICE.value), settings, options)


if __name__ == "__main__":
    command.run(main)
