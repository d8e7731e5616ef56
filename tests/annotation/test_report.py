"""The annotation report: read as HTML, and looked at in a browser where there is one."""

import csv
import dataclasses
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import configs.annotate
from cocoedit_jax.annotation.filter import choose
from cocoedit_jax.annotation.record import SCORE_NAMES, Annotation, Item, to_line
from cocoedit_jax.annotation.report import write_report
from cocoedit_jax.annotation.settings import check
from cocoedit_jax.errors import UserError

RULES = check(configs.annotate.get_config().to_dict()).filter
EVIL = '</script><script>document.title="evil"</script><img src=x onerror=alert(1)> "quoted" & \u2028 end'
COUNT = 60
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """An output folder with 60 annotations of photographs: kept, rejected, dead, unscored; one with hostile texts."""
    data = pytest.importorskip("skimage.data", reason="needs scikit-image's packaged photographs")
    folder = tmp_path_factory.mktemp("annotated")
    (folder / "masks").mkdir()
    for name in ("astronaut", "coffee", "chelsea"):
        Image.fromarray(getattr(data, name)()).save(folder / f"{name}.png")
    sizes = {name: Image.fromarray(getattr(data, name)()).size for name in ("astronaut", "coffee", "chelsea")}
    rng = np.random.default_rng(0)
    annotations = []
    for number in range(COUNT):
        name = ("astronaut", "coffee", "chelsea")[number % 3]
        width, height = sizes[name]
        item = Item(f"r{number:02d}", str(folder / f"{name}.png"), f"change {number}", ("add", "remove")[number % 2])
        if number == 5:
            item = Item(EVIL, item.image, EVIL, EVIL, extra={"note": EVIL})
        if number == 7:
            item = Item("formula", item.image, '=HYPERLINK("x"), then', "add")
        base = Annotation(item, size=(width, height), stage="load")
        if number < 3:
            annotations.append(Annotation(item).dead("unreadable_image", EVIL))
        elif number < 5:
            base = Annotation(item, size=(width, height), stage="classify")
            annotations.append(base.rejected("global_edit", "kind style"))
        else:
            mask = np.full((height, width), 255, np.uint8)
            mask[height // 4 : height // 2, width // 4 : width // 2] = 0
            Image.fromarray(mask).save(folder / f"masks/{number}.png")
            scores = dict(zip(SCORE_NAMES, rng.uniform(0.4, 1, 3).round(4).tolist(), strict=True))
            if number == 9:
                scores["prominence"] = None
            measures = {
                "area": float(rng.uniform(0, 0.8)), "crop_area": float(rng.uniform(0, 1)),
                "components": int(rng.integers(1, 12)), "box_iou": float(rng.uniform(0.2, 1)), "border": 0.1,
            }  # fmt: skip
            done = Annotation(
                item, (width, height), (width / 4, height / 4, width / 2, height / 2), f"masks/{number}.png",
                measures["area"], f"refined {number}", scores, {"measures": measures}, "score",
            )  # fmt: skip
            annotations.append(choose(done, RULES))
    (folder / "scores.jsonl").write_text("".join(map(to_line, annotations)), encoding="utf-8")
    (folder / "masks/8.png").unlink()
    return folder, annotations


class Page(HTMLParser):
    """Tags with attributes, and the text of each element by id and of table cells."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.cells, self.texts, self._open = [], [], {}, []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags.append((tag, attributes))
        if tag == "tr":
            self.cells.append([])
        if tag == "td":
            self.cells[-1].append("")
        if tag not in ("img", "meta", "input", "br"):
            self._open.append((tag, attributes.get("id")))

    def handle_endtag(self, tag):
        assert self._open and self._open[-1][0] == tag, f"</{tag}> closes {self._open[-1:]}"
        self._open.pop()

    def handle_data(self, data):
        for _, name in self._open:
            if name:
                self.texts[name] = self.texts.get(name, "") + data
        if any(tag == "td" for tag, _ in self._open) and self.cells and self.cells[-1]:
            self.cells[-1][-1] += data


@pytest.fixture(scope="module")
def page(run):
    path = write_report(run[0], RULES, examples=4, audit=20)
    assert path == run[0] / "report.html"
    return path.read_text(encoding="utf-8")


def test_counts_are_those_of_the_data(run, page):
    _, annotations = run
    parsed = Page(page)
    assert parsed._open == []
    rows = {row[0]: row[1:] for row in parsed.cells if row}
    statuses = Counter(annotation.status for annotation in annotations)
    assert statuses["kept"] > 2 and statuses["rejected"] > 10 and statuses["dead"] == 4
    assert f"{COUNT} in = {statuses['kept']} kept + {statuses['rejected']} rejected + 4 dead." in page
    funnel = {"given": 60, "picture opened": 57, "local edit": 55, "target found": 55, "scored": 55}
    for words, count in {**funnel, "kept by the filter": statuses["kept"]}.items():
        assert rows[words][:2] == [str(count), f"{100 * count / 60:.1f} %"]
    reasons = Counter(annotation.reason for annotation in annotations if annotation.reason)
    for reason, count in reasons.items():
        assert rows[reason][1] == str(count) and rows[reason][2]
    types = Counter(annotation.edit_type for annotation in annotations)
    for name, count in {**types, "all": COUNT}.items():
        assert [row[1] for row in parsed.cells if len(row) == 7 and row[0] == (name or "no type")] == [str(count)]
    data = json.loads(parsed.texts["data"])
    scored = [annotation for annotation in annotations if annotation.stage == "score"]
    assert data["columns"]["clarity"] == [annotation.scores["clarity"] for annotation in scored]
    assert data["columns"]["box_iou"] == [annotation.attributes["measures"]["box_iou"] for annotation in scored]
    assert [data["types"][number] for number in data["type"]] == [annotation.edit_type for annotation in scored]
    # Histograms: of "all", the clarity of everything scored.
    titles = re.findall(r"<title>(\d+) values, median ([\d.]+); counts from 0 to 1: ([\d ]+)</title>", page)
    clarity = [annotation.scores["clarity"] for annotation in scored]
    expected = ("55", f"{np.median(clarity):.2f}", " ".join(map(str, np.histogram(clarity, 20, (0, 1))[0])))
    assert expected in titles and ("54",) == tuple(t[0] for t in titles if t[0] == "54")


def test_the_page_asks_for_nothing_and_runs_nothing_else(page):
    parsed = Page(page)
    for tag, attributes in parsed.tags:
        for name in ("src", "href", "srcset", "action", "poster", "data"):
            assert attributes.get(name, "data:").startswith("data:image/"[:5]), (tag, attributes)
        assert not any(name.startswith("on") for name in attributes)
    assert not re.search(r"https?:|@import|url\(|//cdn", page)
    scripts = [attributes for tag, attributes in parsed.tags if tag == "script"]
    assert scripts == [{"type": "application/json", "id": "data"}, {}]
    policy = next(a["content"] for tag, a in parsed.tags if tag == "meta" and "http-equiv" in a)
    assert policy.startswith("default-src 'none'; img-src data:;") and "script-src 'sha256-" in policy
    # Hostile texts are there as texts.
    assert EVIL in json.loads(parsed.texts["data"])["types"]
    assert "<script>document" not in page and "<img src=x" not in page
    assert not any(attributes.get("src") == "x" for _, attributes in parsed.tags)


def test_pictures(run, page):
    _, annotations = run
    parsed = Page(page)
    images = [attributes for tag, attributes in parsed.tags if tag == "img"]
    assert len(images) == 4 + 4 + 4 + 20
    cards = [attributes for tag, attributes in parsed.tags if tag == "article"]
    quality = {a.item.id: min(a.scores.values()) for a in annotations if a.mask_file and None not in a.scores.values()}
    best = sorted(quality, key=lambda name: -quality[name])[:4]
    assert [attributes["title"] for attributes in cards[:4]] == best
    assert cards[4]["title"] == "r09"  # a score is missing: the worst
    audited = [attributes for attributes in cards if "data-audit" in attributes]
    by_id = {annotation.item.id: annotation for annotation in annotations}
    assert len(audited) == 20 and all(by_id[a["title"]].status == a["data-status"] for a in audited)
    assert len({attributes["title"] for attributes in audited}) == 20
    boxes = [attributes["style"] for tag, attributes in parsed.tags if attributes.get("class") == "box"]
    assert boxes and set(boxes) == {"left:25.00%;top:25.00%;width:25.00%;height:25.00%"}


def test_the_same_again_and_another_draw(run, page):
    folder, _ = run
    again = write_report(folder, RULES, examples=4, audit=20).read_text(encoding="utf-8")
    other = write_report(folder, RULES, examples=4, audit=20, seed=1).read_text(encoding="utf-8")
    assert again == page and other != page
    all_of_them = write_report(folder, RULES, audit=1000).read_text(encoding="utf-8")
    assert "no mask: " in all_of_them and "55 records with a mask" in all_of_them


def test_faults(tmp_path, run):
    with pytest.raises(UserError, match="scores.jsonl: no such file"):
        write_report(tmp_path, RULES)
    (tmp_path / "scores.jsonl").write_text("")
    with pytest.raises(UserError, match="empty; nothing to report"):
        write_report(tmp_path, RULES)
    (tmp_path / "scores.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match="scores.jsonl line 1"):
        write_report(tmp_path, RULES)


# --- in a browser -----------------------------------------------------------------------------------------------------


def find_browser():
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "headless_shell")
    found = [path for name in names if (path := shutil.which(name))]
    cache = Path(os.environ.get("PLAYWRIGHT_BROWSERS_PATH") or Path.home() / ".cache/ms-playwright")
    found += [str(path) for name in ("headless_shell", "chrome") for path in sorted(cache.glob(f"chromium*/*/{name}"))]
    return found[0] if found else None


BROWSER = find_browser()
needs_browser = pytest.mark.skipif(BROWSER is None, reason="needs Chromium (package chromium, or playwright install)")


def browse(page, profile, *options, fragment=""):
    """Chromium's standard output for a page in a file, with nothing to be reached."""
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", "--disable-quic", "--disable-dev-shm-usage",
        "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={profile}", "--hide-scrollbars",
        "--virtual-time-budget=2000", *options, f"{page.resolve().as_uri()}{fragment}",
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.fixture(scope="module")
def profile(tmp_path_factory):
    """One for all: a browser's first start makes it."""
    return tmp_path_factory.mktemp("browser")


@needs_browser
def test_thresholds_in_a_browser(run, page, profile, tmp_path):
    """The counts that the page shows are those of the filter, for the chosen thresholds and for others."""
    folder, annotations = run
    path = tmp_path / "report.html"
    path.write_text(page, encoding="utf-8")
    shown = Page(browse(path, profile, "--dump-dom"))
    kept = [annotation for annotation in annotations if annotation.status == "kept"]
    assert shown.texts["passing"] == f"{len(kept)} of 55 ({100 * len(kept) / 55:.1f} %)"
    types = json.loads(shown.texts["data"])["types"]
    for number, name in enumerate(types):
        assert shown.texts[f"passing-{number}"] == str(sum(a.edit_type == name for a in kept))
    assert shown.texts["refilter"].startswith(
        f"python -m launch.annotate --output={folder} --refilter --config.filter."
    )
    fragment = "#min_clarity=0.55&min_area=0.2&max_components=4"
    shown = Page(browse(path, profile, "--dump-dom", fragment=fragment))
    other = dataclasses.replace(RULES, min_clarity=0.55, min_area=0.2, max_components=4)
    pending = [dataclasses.replace(a, status="pending") for a in annotations if a.stage == "score"]
    count = sum(choose(annotation, other).status == "kept" for annotation in pending)
    assert shown.texts["passing"].startswith(f"{count} of 55 ") and count != len(kept)
    assert "--config.filter.min_clarity=0.55" in shown.texts["refilter"]


def parsed_filter(flags):
    """`config.filter` as launch.annotate reads it from a command line."""
    code = (
        "import json, sys; from absl import flags; from launch import annotate; flags.FLAGS(sys.argv);"
        "print(json.dumps(annotate._CONFIG.value.filter.to_dict()))"
    )
    command = [sys.executable, "-c", code, *flags]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout)


OTHER = dataclasses.replace(RULES, min_prominence=None, max_area=0.55, duplicates="exact", near_bits=2, near_colour=3.5)


def test_every_threshold_can_be_given_again(run, tmp_path):
    """Also those that no slider moves, and None: the report knows of no configuration file."""
    (tmp_path / "scores.jsonl").write_bytes((run[0] / "scores.jsonl").read_bytes())
    page = Page(write_report(tmp_path, OTHER, examples=0, audit=0).read_text(encoding="utf-8"))
    thresholds = json.loads(page.texts["data"])["thresholds"]
    flags = [f"--config.filter.{name}={value}" for name, value in thresholds.items()]
    assert parsed_filter(["--output=x", *flags]) == dataclasses.asdict(OTHER)


@needs_browser
def test_the_command_in_a_browser(run, profile, tmp_path):
    (tmp_path / "scores.jsonl").write_bytes((run[0] / "scores.jsonl").read_bytes())
    path = write_report(tmp_path, OTHER, examples=0, audit=0)
    for fragment, moved in (("", {}), ("#min_prominence=0.4&max_area=0.35", {"min_prominence": 0.4, "max_area": 0.35})):
        shown = Page(browse(path, profile, "--dump-dom", fragment=fragment))
        *start, output, refilter = shlex.split(shown.texts["refilter"])[:5]
        assert start == ["python", "-m", "launch.annotate"] and refilter == "--refilter"
        given = parsed_filter([output, *shlex.split(shown.texts["refilter"])[3:]])
        assert given == dataclasses.asdict(OTHER) | moved


@needs_browser
def test_the_audit_in_a_browser(run, page, profile, tmp_path):
    """Two verdicts and a note, saved as CSV: read back with Python's reader."""
    act = """<pre id="csv"></pre><script>
      const parts = [];
      URL.createObjectURL = (blob) => { blob.text().then((text) => {
        document.getElementById("csv").textContent = text; }); return "#"; };
      HTMLAnchorElement.prototype.click = function () { document.title = this.download; };
      const first = cards.find((card) => card.dataset.status === "kept") || cards[0];
      first.querySelector('input[value="good"]').click();
      cards.at(-1).querySelector('input[value="wrong mask"]').click();
      cards.at(-1).querySelector("input[type=text]").value = 'two, "three"';
      document.getElementById("export").click();
    </script>"""
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page)
    path = tmp_path / "report.html"
    path.write_text(text.replace("</body>", f"{act}</body>"), encoding="utf-8")
    dom = browse(path, profile, "--dump-dom")
    shown = Page(dom)
    assert "<title>audit.csv</title>" in dom
    rows = list(csv.DictReader(io.StringIO(shown.texts["csv"].lstrip("\ufeff"))))
    data = json.loads(shown.texts["data"])
    assert [row["id"] for row in rows] == [record[0] for record in data["audit"]] and len(rows) == 20
    for row, record in zip(rows, data["audit"], strict=True):
        expected = dict(zip(data["audit_fields"], record, strict=True))
        assert row["clarity"] == str(expected["clarity"]) and row["status"] == expected["status"]
        assert row["prompt"].removeprefix("'") == expected["prompt"]
        assert not row["prompt"].startswith("=")
    assert Counter(row["verdict"] for row in rows) == {"": 18, "good": 1, "wrong mask": 1}
    assert rows[-1]["note"] == 'two, "three"' and rows[-1]["verdict"] == "wrong mask"
    agree = 1 + (rows[-1]["status"] != "kept")
    assert shown.texts["agreement"] == f"2 of 20 judged. The filter agrees with {agree} of 2 ({50 * agree} %)."


@needs_browser
@pytest.mark.parametrize(("width", "height", "dark"), [(1200, 2600, False), (420, 4200, True)])
def test_screenshot(page, profile, tmp_path, width, height, dark):
    """Looked at: the page is drawn from top to bottom, with photographs, red regions and yellow boxes."""
    path, picture = tmp_path / "report.html", tmp_path / "report.png"
    path.write_text(page, encoding="utf-8")
    theme = ["--blink-settings=preferredColorScheme=0"] if dark else ["--blink-settings=preferredColorScheme=1"]
    browse(path, profile, f"--screenshot={picture}", f"--window-size={width},{height}", *theme)
    if folder := os.environ.get("COCOEDIT_SCREENSHOTS"):
        shutil.copy(picture, Path(folder) / f"annotation_report_{width}.png")
    with Image.open(picture) as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    assert pixels.shape[:2] == (height, width)
    back = (27, 30, 36) if dark else (255, 255, 255)
    assert (pixels[2, 2] == back).all()
    drawn = (np.abs(pixels - back).sum(axis=2) > 30).mean(axis=1)
    assert (drawn[:1200].reshape(6, 200).max(axis=1) > 0).all()  # no part of the first screens is empty
    red, green, blue = pixels[..., 0], pixels[..., 1], pixels[..., 2]
    assert ((red > 120) & (green < 0.6 * red) & (blue < 0.6 * red)).mean() > 0.002
    assert ((red == 255) & (green == 214) & (blue == 10)).sum() > 500  # boxes
    assert ((red == 42) & (green == 120) & (blue == 194)).sum() > 1000  # bars
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 5000  # photographs
