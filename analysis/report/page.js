for (const place of document.querySelectorAll(".chart")) {
  const spec = JSON.parse(place.nextElementSibling.textContent);
  const options = { mode: "vega-lite", renderer: "svg", ast: true, actions: false, defaultStyle: false };
  vegaEmbed(place, spec, options).catch((error) => {
    console.error(error);
    place.textContent = "This chart could not be drawn: " + error.message;
  });
}
