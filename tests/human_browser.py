"""Judge on the page of a human judge in a real browser (Chromium, from PySide6), by the rules for paraphrases.

    python tests/human_browser.py ADDRESS VOTES SCREENSHOT.png

Presses keys as a person does, and measures in the page how long the next comparison takes to appear. The last line is a
JSON object: votes, the milliseconds of each, and whether the next comparison was of the same round.
"""

import json
import os
import re
import sys
import time

os.environ.setdefault("QT_QPA_PLATFORM", "offscreen")
os.environ.setdefault("QTWEBENGINE_CHROMIUM_FLAGS", "--no-sandbox --disable-gpu")

from PySide6.QtCore import QTimer, QUrl
from PySide6.QtWebEngineWidgets import QWebEngineView
from PySide6.QtWidgets import QApplication

from xpo_jax.config.loader import load
from xpo_jax.experiment.judge_factory import make_judge
from xpo_jax.values import Comparison

READ = "JSON.stringify({pair, waited: window.waited || null, note: $('note').textContent})"
PRESS = """(key => {
  const before = pair.id, start = performance.now();
  window.waited = null;
  document.dispatchEvent(new KeyboardEvent("keydown", {key}));
  const look = () => !pair || pair.id !== before
    ? window.waited = [performance.now() - start, Boolean(pair)] : setTimeout(look, 1);
  look();
})"""
KEYS = {1.0: "ArrowLeft", 0.0: "ArrowRight"}


def main(address: str, votes: int, screenshot: str) -> None:
    judge = make_judge(load("paraphrase").judge, "judge")
    app = QApplication(sys.argv[:1])
    view = QWebEngineView()
    view.resize(1100, 800)
    view.show()
    view.load(QUrl(address))
    waits, pressed, last = [], None, time.monotonic()

    def read() -> None:
        view.page().runJavaScript(READ, 0, act)

    def act(text: str) -> None:
        nonlocal pressed, last
        state = json.loads(text) if text else {"pair": None, "waited": None}
        pair, idle = state["pair"], time.monotonic() - last
        if pressed and state["waited"]:
            waits.append(state["waited"])
            pressed = None
        if len(waits) == votes or idle > 120:
            app.quit()
            return
        if pair and not pressed:
            if len(waits) == votes // 2 and not os.path.exists(screenshot):
                view.grab().save(screenshot)
            source = re.search("<pphr_input>(.*)</pphr_input>", pair["messages"][-1]["content"], re.DOTALL)[1]
            a, b = ("".join(text for text, _ in pair[side]) for side in "ab")
            (verdict,) = judge([Comparison(pair["messages"], {"input": source}, a, b)])
            key = "ArrowDown" if verdict.p == 0.5 else KEYS[float(verdict.p > 0.5)]
            pressed, last = pair["id"], time.monotonic()
            view.page().runJavaScript(f"{PRESS}({json.dumps(key)})")
        QTimer.singleShot(10, read)

    view.loadFinished.connect(lambda _: QTimer.singleShot(300, read))
    app.exec()
    print(json.dumps({"votes": len(waits), "waits": waits}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
