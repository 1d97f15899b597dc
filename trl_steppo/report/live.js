"use strict";
// Loads the page again when its runs have logged something new, and puts the reader back where they were.
(() => {
  const POLL_MS = 2000;
  const PAUSE_MS = 1500; // after the reader's last action, so that nothing moves under their hand
  const KEY = "trl-steppo-place";
  const version = document.documentElement.dataset.version;
  const status = document.getElementById("live");
  let lastAction = 0;
  history.scrollRestoration = "manual";

  // -- the reader's place ---------------------------------------------------------------------------------------------

  // Sections grow: the place is a section, and the distance from its top.
  function scrollPlace() {
    const sections = [...document.querySelectorAll("main > section")];
    const section = sections.filter((element) => element.getBoundingClientRect().top <= 80).pop();
    return section ? { section: section.id, offset: -section.getBoundingClientRect().top } : { section: "", offset: window.scrollY };
  }

  const openSections = () => [...document.querySelectorAll("main > section > details")].map((details) => details.open);

  function leave() {
    const viewer = window.steppoViewer;
    const place = { scroll: scrollPlace(), open: openSections(), viewer: viewer ? viewer.place() : null };
    sessionStorage.setItem(KEY, JSON.stringify(place));
    window.location.reload();
  }

  function comeBack() {
    const kept = sessionStorage.getItem(KEY);
    sessionStorage.removeItem(KEY);
    if (!kept) return;
    const { scroll, open, viewer } = JSON.parse(kept);
    if (viewer && window.steppoViewer) window.steppoViewer.goTo(viewer);
    document.querySelectorAll("main > section > details").forEach((details, i) => (details.open = Boolean(open[i])));
    const section = scroll.section && document.getElementById(scroll.section);
    const top = section ? section.getBoundingClientRect().top + window.scrollY : 0;
    window.scrollTo({ top: top + scroll.offset, behavior: "instant" });
  }

  // -- the server -----------------------------------------------------------------------------------------------------

  async function look() {
    try {
      const answer = await fetch("/version", { cache: "no-store" });
      if (!answer.ok) throw new Error(answer.statusText);
      const current = await answer.text();
      status.textContent = "live: this page renews itself";
      status.classList.remove("over");
      if (current !== version && Date.now() - lastAction > PAUSE_MS) return leave();
    } catch {
      status.textContent = "not live: the server has ended, and this is the last page that it made";
      status.classList.add("over");
    }
    window.setTimeout(look, POLL_MS);
  }

  for (const name of ["pointerdown", "keydown", "wheel", "change"]) {
    window.addEventListener(name, () => (lastAction = Date.now()), { capture: true, passive: true });
  }
  comeBack();
  window.setTimeout(look, POLL_MS);
})();
