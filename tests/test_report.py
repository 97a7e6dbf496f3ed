"""The report: what it states about a run, that texts stay texts, and how it behaves in a browser."""

import base64
import hashlib
import html
import html.parser
import http.server
import json
import re
import shutil
import subprocess
import threading
import xml.etree.ElementTree as ElementTree

import markupsafe
import pytest
from fake_run import ROWS, evaluation, step, write_run

from xpo_jax.reporting import html as pages
from xpo_jax.reporting import report
from xpo_jax.reporting.charts import MAX_POINTS, Line, chart
from xpo_jax.reporting.run_reader import findings, read

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


# ---- a run directory, written by hand ---------------------------------------------------------------


# ---- what it reads ----------------------------------------------------------------------------------


def test_read_returns_steps_evaluations_and_the_last_pairs(tmp_path):
    run = read(write_run(tmp_path / "run", [*ROWS[:2], step(1, repeated=1), ROWS[2]]))
    assert [row["step"] for row in run.metrics] == [0, 1, 2] and run.metrics[1]["repeated"] == 1
    assert [(row["step"], row["queries"]) for row in run.evaluations] == [(0, 0), (2, 16)]
    assert len(run.samples) == 4 and run.result["ended_by"] == "steps"
    assert [(row["step"], row["position"]) for row in run.pairs[-2:]] == [(299, 0), (299, 1)]
    assert len(run.pairs) == 200
    under_way = read(write_run(tmp_path / "other", ROWS[:2], result=False))
    assert under_way.result is None and "under way" in report.html(under_way)


def test_read_no_run_or_damaged_is_one_line(tmp_path):
    with pytest.raises(
        ValueError, match="is no run directory with config.json and metrics.jsonl; name a run"
    ):
        read(tmp_path)
    with pytest.raises(ValueError, match="has no evaluation yet; wait for its first$"):
        read(write_run(tmp_path / "early", [step(1)]))
    path = write_run(tmp_path / "damaged", ROWS)
    (path / "metrics.jsonl").write_text('{"step": 0}\n{"step"\n')
    with pytest.raises(
        ValueError, match="metrics.jsonl: a line is not JSON .*; restore the file or delete that line"
    ):
        read(path)


# ---- what it finds ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ((0.5, 0.05), {"rate": 0.7}, ["good better", "good control", "good even", "good valid"]),
        ((0.5, 0.05), {"rate": 0.52}, ["look cannot", "good control", "look even", "good valid"]),
        ((0.5, 0.05), {"rate": 0.3}, ["bad worse", "good control", "bad even", "good valid"]),
        ((0.6, 0.05), {"rate": 0.7}, ["good better", "look control", "good even", "good valid"]),
        ((0.5, 0.05), {"rate": 0.7, "even": 0.52}, ["good better", "good control", "bad even", "good valid"]),
        (
            (0.5, 0.05),
            {"rate": 0.7, "valid": 0.8, "tokens": 15.0},
            ["good better", "good control", "good even", "look valid", "look tokens"],
        ),
    ],
)
def test_findings_of_evaluations(tmp_path, before, after, expected):
    last = evaluation(after.pop("rate"), 0.05, **after)
    run = read(write_run(tmp_path / "run", [{"step": 0, **evaluation(*before)}, step(2, **last)]))
    words = {"control": "before the first step", "even": "at equal lengths", "valid": "valid answers"}
    statements = findings(run)
    assert len(statements) == len(expected)
    for (kind, text), what in zip(statements, expected, strict=True):
        assert kind == what.split()[0] and words.get(what.split()[1], what.split()[1]) in text


def test_findings_of_the_steps(tmp_path):
    bad = {
        "judge/failed_rate": 0.25,
        "judge/position_flip_rate": 0.5,
        "loss/clipped_share": 0.1,
        "skipped": 1,
    }
    run = read(write_run(tmp_path / "run", [ROWS[0], step(1, **bad), ROWS[2]], reference="another"))
    texts = [text for _, text in findings(run)]
    assert not any("before the first step" in text for text in texts)  # two models need not tie
    assert texts[-4:] == [
        "training pairs without a verdict: 25 %",
        "verdicts that change with the order shown: 50 %",
        "bonus at its limit: 10 %",
        "updates skipped for numbers that were not finite: 50 %",
    ]


# ---- what it looks like -----------------------------------------------------------------------------


def drawn(figure):
    """Return the chart's SVG, as the templates draw it."""
    parts = pages._environment().get_template("parts.html.j2").module
    return ElementTree.fromstring(re.search("<svg.*</svg>", parts.charts([figure]), re.DOTALL)[0])


def test_chart_points_lie_where_their_values_are():
    lines = [
        Line(
            "up",
            [(0, 0.0), (10, 0.5), (20, None), (30, 1.0)],
            [(0.0, 0.1), (0.4, 0.6), (None, None), (0.9, 1.0)],
        ),
        Line("nothing", [(0, None)]),
    ]
    svg = drawn(chart("<t>", lines, x="steps", percent=True))
    (path,) = [element.attrib["d"] for element in svg.iter("path")]
    places = re.findall(r"([ML])([\d.]+) ([\d.]+)", path)
    assert [kind for kind, _, _ in places] == ["M", "L", "M"]  # a gap where there is no value
    xs, ys = ([float(place[i]) for place in places] for i in (1, 2))
    assert xs[1] - xs[0] == pytest.approx((xs[2] - xs[0]) / 3, abs=0.1)
    assert ys[0] - ys[1] == pytest.approx((ys[0] - ys[2]) / 2, abs=0.1) and ys[0] > ys[2]
    texts = [element.text for element in svg.iter("text")]
    assert texts[:6] == ["0 %", "20 %", "40 %", "60 %", "80 %", "100 %"] and "30" in texts
    assert [element.text for element in svg.iter("title")][-1] == "up, steps 30: 100 %"
    assert len(list(svg.iter("polygon"))) == 1
    assert chart("empty", [Line("nothing", [(0, None), (1, float("nan"))])], x="steps") is None


def test_chart_long_line_is_averaged_and_labelled_so():
    points = [(i, float(i % 2)) for i in range(4 * MAX_POINTS)]
    figure = chart("t", [Line("odd", points)], x="steps")
    (curve,) = figure.curves
    assert len(curve.points) == MAX_POINTS and curve.name == "odd (means of 4)"
    assert curve.points[0].label == "steps 3: 0.5"


@pytest.mark.parametrize("values", [(5.0, 5.0), (0.0, 0.0), (-3e-7, 4e-7), (1e6, 9e6)])
def test_chart_axes_include_all_values(values):
    figure = chart("t", [Line("a", list(enumerate(values)))], x="steps")
    heights = [float(circle.attrib["cy"]) for circle in drawn(figure).iter("circle")]
    assert len(heights) == 2 and all(10 <= y <= 210 for y in heights)


HOSTILE = '</td></table><script>document.title="run"</script><img src="http://bait.invalid/i" onerror="x()">'


def test_report_hostile_texts_stay_texts(tmp_path):
    text = report.html(read(write_run(tmp_path / "run", ROWS, hostile=HOSTILE)))
    seen = Tags()
    seen.feed(text)
    assert seen.names.isdisjoint({"img", "link", "iframe", "object", "a"}) and seen.scripts == 1
    assert seen.attributes.isdisjoint({"src", "href", "action", "srcset", "onerror"})
    style = re.search("<style>(.*)</style>", text, re.DOTALL)[1]
    assert len(style) > 1000 and "url(" not in style and "@import" not in style
    assert (
        text.count(str(markupsafe.escape(HOSTILE))) > 4
    )  # of the samples, the pairs, the reasons, the scores


class Tags(html.parser.HTMLParser):
    """Collects what a browser would take for tags."""

    def __init__(self):
        super().__init__()
        self.names, self.attributes, self.scripts = set(), set(), 0

    def handle_starttag(self, tag, attrs):
        self.names.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.scripts += tag == "script"


def test_write_same_run_gives_the_same_file(tmp_path):
    path = write_run(tmp_path / "run", ROWS)
    out = report.write(path)
    first = out.read_bytes()
    assert out == path / "report.html" and report.write(path).read_bytes() == first
    for text in (
        b"70.0 % [65.0, 75.0]",
        b"The judge&#39;s taste",
        b"policy was shown as B",
        b"2 of 2 steps, finished",
    ):
        assert text in first


# ---- in a browser -----------------------------------------------------------------------------------


@pytest.fixture
def proxy():
    """Yield the address of a proxy for the browser, and the hosts and URLs that were requested from it."""
    requests = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            self.send_error(404)

        do_CONNECT = do_GET

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield f"127.0.0.1:{server.server_address[1]}", requests
    server.shutdown()
    server.server_close()


def opened(path, folder, proxy):
    """Return the page's DOM after its scripts ran."""
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    command += ["--disable-component-update", "--disable-sync", "--no-first-run", f"--user-data-dir={folder}"]
    command += [f"--proxy-server={proxy}", "--proxy-bypass-list=<-loopback>", "--dump-dom", path.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (Debian's package chromium)")
def test_report_in_chromium_filters_sorts_and_fetches_nothing(tmp_path, proxy):
    """Filtering, choosing and sorting work; no text runs; nothing is fetched, though the proxy would see it."""
    address, requests = proxy
    path = report.write(write_run(tmp_path / "run", ROWS, hostile=HOSTILE))
    text = path.read_text()
    dom = opened(path, tmp_path / "profile", address)
    assert "<title>run: xpo_jax</title>" in dom and "4 of 4" in dom
    assert [url for url in requests if "bait" in url] == []

    # a reader's actions, done by a script that this copy's policy lets run
    hand = """<script>
      const [box] = document.querySelectorAll('.browse'), menu = box.querySelector('select');
      const shown = () => [...box.querySelectorAll('tbody tr')].filter(r => !r.hidden).map(r => r.dataset.kind);
      const kindsShown = [];
      menu.value = 'lost'; menu.dispatchEvent(new Event('change')); kindsShown.push(shown());
      menu.value = ''; menu.dispatchEvent(new Event('change'));
      for (const i of [4, 4]) { box.querySelectorAll('th button')[i].click(); kindsShown.push(shown()); }
      const field = box.querySelector('input');
      field.value = 'SHOWN AS A'; field.dispatchEvent(new Event('input')); kindsShown.push(shown());
      const note = document.createElement('p'); note.id = 'kinds'; note.textContent = JSON.stringify(kindsShown);
      document.body.append(note, box.querySelector('output').cloneNode(true));
    </script><img src="http://bait.invalid/control">"""
    copy = tmp_path / "played.html"
    free = re.sub(r"<meta http-equiv.*?>\n", "", text, count=1)
    copy.write_text(free.replace("</body>", hand + "</body>"))
    dom = opened(copy, tmp_path / "profile", address)
    kinds_shown = json.loads(html.unescape(re.search(r'<p id="kinds">(.*?)</p>', dom)[1]))
    by_verdict = ["failed", "lost", "tied", "won"]
    assert kinds_shown == [["lost"], by_verdict, by_verdict[::-1], ["won", "failed"]]
    assert dom.count("2 of 4") == 2
    assert any("bait.invalid/control" in url for url in requests)  # so a request would have been seen


def test_report_policy_names_the_script(tmp_path):
    run = read(write_run(tmp_path / "run", ROWS))
    text = report.html(run)
    digest = re.search("script-src '(sha256-[^']+)'", text)[1]
    script = re.search("<script>(.*)</script>", text, re.DOTALL)[1]
    assert digest == "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert "default-src 'none'" in text
