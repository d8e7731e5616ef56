"""Settings of the judge "vlm", a vision-language model behind OpenAI's chat completions: shared by configurations."""

from ml_collections import ConfigDict


def vlm_judge() -> ConfigDict:
    """The section ``config.judge.vlm``."""
    vlm = ConfigDict()
    vlm.endpoints = "http://127.0.0.1:8000/v1"  # base URLs, separated by commas: launch.serve_judge, or any vLLM
    vlm.model = ""  # name on the servers; empty: the only one that they have
    vlm.template = "cocoedit"  # or edit_r1 (records have a field requirement), two_question, or a .json file
    vlm.concurrency = 32  # requests under way at once, over all endpoints
    vlm.timeout_s = 60.0  # seconds for one attempt
    vlm.step_deadline_s = 600.0  # seconds from drawing a batch of edits to giving up its missing scores
    vlm.start_deadline_s = 60.0  # seconds for the servers to answer before the run starts
    vlm.image_format = "png"  # png, jpeg
    vlm.jpeg_quality = 95  # 95 to 100
    vlm.cache_dir = "runs/judge_cache"  # judgements by content, shared by runs; empty: none on disk
    vlm.key_env = ""  # environment variable that holds the API key
    vlm.key_file = ""  # or a file that does
    vlm.canary_every = 50  # optimizer steps between checks with pictures whose order is known; 0: at the start only
    vlm.canary_margin = 0.05  # by how much the good ones must score higher; negative: no such checks
    vlm.min_mass = 0.5  # an answer with less probability on the digits 0 to 5 is no score
    vlm.digit_token_ids = ()  # ids of the tokens 0 to 5, for servers with logprob_token_ids; empty: Qwen's are tried
    return vlm
