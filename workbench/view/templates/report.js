"use strict";
(function () {
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const plots = Array.from(document.querySelectorAll("[data-figure]"));

  function colours() {
    const style = getComputedStyle(document.documentElement);
    const ink = style.getPropertyValue("--ink").trim();
    const soft = style.getPropertyValue("--soft").trim();
    const paper = style.getPropertyValue("--paper").trim();
    const grid = style.getPropertyValue("--grid").trim();
    return {
      "font.color": ink, "title.subtitle.font.color": soft, "paper_bgcolor": paper, "plot_bgcolor": paper,
      "xaxis.gridcolor": grid, "yaxis.gridcolor": grid,
    };
  }

  for (const plot of plots) {
    const figure = JSON.parse(document.getElementById(plot.dataset.figure).textContent);
    Plotly.newPlot(plot, figure.data, figure.layout, { responsive: true, displaylogo: false })
      .then(() => Plotly.relayout(plot, colours()));
  }
  dark.addEventListener("change", () => plots.forEach((plot) => Plotly.relayout(plot, colours())));
  window.addEventListener("beforeprint", () => plots.forEach((plot) => Plotly.Plots.resize(plot)));
})();
