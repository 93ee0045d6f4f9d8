for (const place of document.querySelectorAll(".chart")) {
  const spec = JSON.parse(place.nextElementSibling.textContent);
  const options = { mode: "vega-lite", renderer: "svg", ast: true, actions: false, defaultStyle: false };
  vegaEmbed(place, spec, options).catch((error) => {
    console.error(error);
    place.textContent = "This chart could not be drawn: " + error.message;
  });
}

// Charts follow the window's width, and paper is narrower than most windows.
const width = (of) => {
  document.body.style.width = of;
  window.dispatchEvent(new Event("resize"));
};
window.addEventListener("beforeprint", () => width("42rem"));
window.addEventListener("afterprint", () => width(""));
