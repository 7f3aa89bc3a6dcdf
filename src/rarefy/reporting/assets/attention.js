"use strict";
// Three maps of one head, drawn cell by cell, and what lies under the pointer in all of them.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const names = ["estimated", "selected", "true"];
  const decode = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  for (const layer of data.layers) for (const name of names) layer[name] = decode(layer[name]);
  const find = (name) => document.getElementById(name);
  const percent = (value) => `${(100 * value).toFixed(1)}%`;

  // Viridis at nine points, which is enough to tell shades apart.
  const stops = [[68, 1, 84], [71, 44, 122], [59, 81, 139], [44, 113, 142], [33, 144, 141], [39, 173, 129],
    [92, 200, 99], [170, 220, 50], [253, 231, 37]];
  const colour = (shade) => {
    const at = (shade - 1) / 254 * (stops.length - 1);
    const low = Math.min(Math.floor(at), stops.length - 2);
    return stops[low].map((part, index) => part + (at - low) * (stops[low + 1][index] - part));
  };
  const draw = (canvas, values, rows, columns) => {
    canvas.width = columns; canvas.height = rows;
    const context = canvas.getContext("2d");
    const image = context.createImageData(columns, rows);
    values.forEach((shade, index) => {
      if (shade) image.data.set([...colour(shade), 255], 4 * index);
    });
    context.putImageData(image, 0, 0);
  };
  draw(find("scale"), Uint8Array.from({ length: 255 }, (_, index) => index + 1), 1, 255);

  let shown = null;
  const show = () => {
    const layer = data.layers[+find("layer").value];
    find("head").max = layer.heads - 1;
    const head = +find("head").value;
    const size = layer.rows * layer.columns;
    shown = { layer, head, maps: {} };
    find("layer-name").textContent = layer.layer;
    find("head-name").textContent = head;
    find("facts").textContent = `Layer ${layer.layer}, head ${head}: ${percent(layer.density[head])} of the blocks, ` +
      `${percent(layer.recall[head])} of the mass (at best ${percent(layer.best[head])}), ` +
      `output error ${layer.error[head].toFixed(3)}.`;
    for (const name of names) {
      shown.maps[name] = layer[name].subarray(head * size, (head + 1) * size);
      draw(find(name), shown.maps[name], layer.rows, layer.columns);
      find(name).setAttribute("aria-label", `${name} map of layer ${layer.layer}, head ${head}`);
    }
  };
  const share = (shade) => shade <= 1 ? `at most ${percent(data.least)}` :
    percent(Math.exp(Math.log(data.least) * (1 - (shade - 1) / 254)));
  const tell = (event) => {
    const { layer, maps } = shown;
    const box = event.currentTarget.getBoundingClientRect();
    const column = Math.min(layer.columns - 1, Math.floor((event.clientX - box.left) / box.width * layer.columns));
    const row = Math.min(layer.rows - 1, Math.floor((event.clientY - box.top) / box.height * layer.rows));
    const at = row * layer.columns + column;
    const [queries, keys] = data.block;
    const where = `Queries ${row * queries} to ${Math.min(data.tokens, (row + 1) * queries) - 1}, keys ` +
      `${column * keys} to ${Math.min(data.tokens, (column + 1) * keys) - 1}`;
    find("readout").textContent = maps.true[at] === 0 ? `${where}: out of reach.` :
      `${where}: estimated ${share(maps.estimated[at])}, ${maps.selected[at] === 255 ? "read" : "not read"}, ` +
      `true ${share(maps.true[at])}.`;
  };
  find("layer").max = data.layers.length - 1;
  for (const name of ["layer", "head"]) find(name).addEventListener("input", show);
  for (const name of names) find(name).addEventListener("pointermove", tell);
  show();
  document.documentElement.dataset.maps = "yes";
})();
