// Draws the plots that the page's #plots element describes; colours are the CSS's.
"use strict";
const font = { family: "system-ui, sans-serif", size: 13 };
const specs = JSON.parse(document.getElementById("plots").textContent);
specs.forEach((spec, index) => {
  const axis = { fixedrange: true, zeroline: false, ticks: "outside", ticklen: 6, tickcolor: "rgba(0,0,0,0)" };
  const layout = {
    showlegend: false,
    margin: { l: 56, r: 16, t: 8, b: 44 },
    ...spec.layout,
    font,
    autosize: true,
    dragmode: false,
    hovermode: "closest",
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    xaxis: { ...axis, ...spec.layout.xaxis },
    yaxis: { ...axis, ...spec.layout.yaxis },
  };
  const config = { displayModeBar: false, responsive: true, doubleClick: false };
  Plotly.newPlot(`plot-${index}`, spec.data, layout, config);
});
