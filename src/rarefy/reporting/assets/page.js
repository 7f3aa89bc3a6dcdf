"use strict";
// The theme, the plots in its colours, and tables that sort. Without scripts the page still has every number.
(() => {
  const root = document.documentElement;
  const themes = ["auto", "light", "dark"];

  const colours = () => {
    const style = getComputedStyle(document.body);
    const line = getComputedStyle(document.querySelector(".card, .run, figure") ?? document.body).borderTopColor;
    return {
      "font.color": style.color, "legend.font.color": style.color,
      "xaxis.gridcolor": line, "yaxis.gridcolor": line, "xaxis.zerolinecolor": line, "yaxis.zerolinecolor": line,
    };
  };
  const plots = [...document.querySelectorAll("script[data-plot]")].map((source) => {
    const place = document.getElementById(source.dataset.plot);
    const { data, layout } = JSON.parse(source.textContent);
    return { place, data, layout };
  });
  const options = { responsive: true, displaylogo: false, displayModeBar: false };
  const drawn = plots.map(({ place, data, layout }) => Plotly.newPlot(place, data, layout, options));
  const recolour = () => plots.map(({ place }) => Plotly.relayout(place, colours()));

  const button = document.getElementById("theme");
  button.addEventListener("click", () => {
    const next = themes[(themes.indexOf(root.dataset.theme) + 1) % themes.length];
    root.dataset.theme = next;
    button.textContent = `Theme: ${next}`;
    recolour();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", recolour);

  for (const heading of document.querySelectorAll("thead th")) {
    heading.querySelector("button").addEventListener("click", () => {
      const table = heading.closest("table");
      const column = [...heading.parentNode.children].indexOf(heading);
      const rising = heading.getAttribute("aria-sort") !== "ascending";
      for (const other of heading.parentNode.children) other.removeAttribute("aria-sort");
      heading.setAttribute("aria-sort", rising ? "ascending" : "descending");
      const value = (row) => row.children[column].textContent;
      const number = (text) => parseFloat(text.replace(/^\+/, ""));
      const order = (a, b) => {
        const [x, y] = [number(value(a)), number(value(b))];
        if (Number.isNaN(x) || Number.isNaN(y)) return value(a).localeCompare(value(b), undefined, { numeric: true });
        return x - y;
      };
      const rows = [...table.tBodies[0].rows].sort((a, b) => (rising ? order(a, b) : order(b, a)));
      table.tBodies[0].append(...rows);
    });
  }

  Promise.all(drawn).then(() => Promise.all(recolour())).then(() => { root.dataset.ready = "yes"; });
})();
