// Code, tables and formulas that are wider than the page scroll inside themselves. The keys scroll
// only what has the focus, so what scrolls becomes a stop of the Tab key. What does not scroll stays
// none; this changes with the width of the window, and when a folded solution is opened.
const mark = (entries) => {
  for (const { target } of entries) {
    const wide = target.scrollWidth > target.clientWidth;
    if (wide || target.scrollHeight > target.clientHeight) target.tabIndex = 0;
    else target.removeAttribute("tabindex");
  }
};

document.addEventListener("DOMContentLoaded", () => {
  const watch = new ResizeObserver(mark);
  const boxes = "pre, .cell_output .output, .table-wrapper, div.math";
  for (const box of document.querySelectorAll(boxes)) watch.observe(box);
});
