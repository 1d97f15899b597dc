"""
The pictures of docs/guides/report.md: two methods on the mini wiki for a few updates, and their report in Chromium.

    python benchmarks/report_pictures.py --output_dir docs/images

It measures nothing. It needs chromium and chromedriver; without them it makes the report alone.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from common.record import BenchmarkArguments, parse_arguments, write_record
from common.runs import EXAMPLES

WIDTH = 1280
FIGURES_HEIGHT, EPISODES_HEIGHT = 1180, 1250


@dataclass
class PictureArguments(BenchmarkArguments):
    """
    Args:
        output_dir (`str`, *optional*, defaults to `"runs/report_pictures"`):
            Where the pictures go.
        runs_dir (`str`, *optional*, defaults to `"runs/report_pictures"`):
            Where the runs are, or will be.
    """

    output_dir: str = field(default="runs/report_pictures", metadata={"help": "Where the pictures go."})
    runs_dir: str = field(default="runs/report_pictures", metadata={"help": "Where the runs are, or will be."})


def compare(directory: Path, updates: int) -> Path:
    """Train both methods, and return their report."""
    command = [sys.executable, "-m", "trl_steppo.cli", "compare", str(EXAMPLES / "hotpotqa_steppo.py")]
    arms = [
        "--arm",
        "StepPO",
        "--arm",
        "token PPO",
        "advantage_estimator=token_gae",
        "importance_sampling_level=token",
    ]
    flags = ["--per_device_train_batch_size", "16", "--gradient_accumulation_steps", "1", "--eval_strategy", "no"]
    flags += ["--total_episodes", str(16 * updates), "--critic_warmup_updates", "0"]
    subprocess.run([*command, "--seeds", "1", "2", *arms, "--output_dir", str(directory), "--", *flags], check=True)
    return directory / "report.html"


def take_pictures(report: Path, output_dir: Path) -> list[Path]:
    """The top of the page, and one question under both methods."""
    from selenium.webdriver import Chrome, ChromeOptions
    from selenium.webdriver.chrome.service import Service
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import Select

    options = ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for flag in ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--window-size={WIDTH},1000"):
        options.add_argument(flag)
    browser = Chrome(options=options, service=Service(shutil.which("chromedriver")))
    pictures = [output_dir / "report_figures.png", output_dir / "report_episodes.png"]
    try:
        browser.get(report.resolve().as_uri())
        browser.set_window_size(WIDTH, FIGURES_HEIGHT)
        browser.save_screenshot(str(pictures[0]))
        Select(browser.find_element(By.ID, "filter-outcome")).select_by_value("right")
        Select(browser.find_element(By.ID, "compare")).select_by_value("1")
        browser.set_window_size(WIDTH, EPISODES_HEIGHT)
        browser.execute_script("document.getElementById('episodes').scrollIntoView()")
        browser.save_screenshot(str(pictures[1]))
    finally:
        browser.quit()
    return pictures


def main(args: PictureArguments) -> None:
    """Train, and take the pictures."""
    directory = Path(args.runs_dir) / ("quick" if args.quick else "")
    report = compare(directory, updates=1 if args.quick else 8)
    output_dir = directory if args.quick else Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    has_browser = shutil.which("chromium") is not None and shutil.which("chromedriver") is not None
    pictures = take_pictures(report, output_dir) if has_browser else []
    write_record(args.json, {"report": str(report), "pictures": [str(path) for path in pictures]})
    print(*(pictures or [report]), sep="\n")


if __name__ == "__main__":
    main(parse_arguments(PictureArguments))
