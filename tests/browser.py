"""Headless Chromium for tests of pages: Debian's, with its driver; installed when root and apt are there."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest

ARTIFACTS = Path(__file__).parent / "artifacts"  # screenshots; ignored by git


def find() -> tuple[str, str] | None:
    """(browser, driver), or None."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    return (browser, driver) if browser and driver else None


def must_be_here() -> str:
    """Why a missing browser is a failure here; "" where a test without one may be left out."""
    if os.environ.get("CI") or os.environ.get("MOE_CL_CI"):
        return "this is CI"
    return "root can install it" if os.geteuid() == 0 and shutil.which("apt-get") else ""


def install() -> bool:
    """Debian's packages. False if this machine cannot install them."""
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        return False
    for command in (["apt-get", "update"], ["apt-get", "install", "-y", "--no-install-recommends", "chromium-driver"]):
        with contextlib.suppress(subprocess.CalledProcessError):
            environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
            subprocess.run(command, check=True, capture_output=True, timeout=600, env=environment)
    return find() is not None


@contextlib.contextmanager
def chromium(width: int = 1280, height: int = 900, dark: bool = False, scale: float = 1.0):
    """A selenium driver on a window of that size; its console can be read with ``get_log("browser")``."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    if find() is None and not install():
        if why := must_be_here():
            pytest.fail(f"no chromium with chromedriver, and Debian's chromium-driver could not be installed ({why})")
        pytest.skip("no chromium with chromedriver here, and no right to install Debian's (root and apt-get needed)")
    browser, driver = find()
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    page = webdriver.Chrome(options=options, service=Service(driver))
    try:
        mobile = width < 600
        metrics = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": mobile}
        page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
        page.execute_cdp_cmd("Network.enable", {})
        offline = {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0}
        page.execute_cdp_cmd("Network.emulateNetworkConditions", offline)
        yield page
    finally:
        page.quit()


def screenshot(page, name: str, whole: bool = True) -> Path:
    """A PNG of the window, or of the whole page, under ``tests/artifacts``."""
    import base64

    ARTIFACTS.mkdir(exist_ok=True)
    options = {"format": "png", "captureBeyondViewport": whole}
    if whole:
        size = page.execute_cdp_cmd("Page.getLayoutMetrics", {})["cssContentSize"]
        options["clip"] = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
    path = ARTIFACTS / f"{name}.png"
    path.write_bytes(base64.b64decode(page.execute_cdp_cmd("Page.captureScreenshot", options)["data"]))
    return path
