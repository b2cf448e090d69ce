// Runs at the end of a copy of report.html, inside a frame, and leaves what it measured as JSON in the page around it.
const visible = (e) => e.getClientRects().length > 0 && getComputedStyle(e).visibility !== "hidden";
const name = (e) => `${e.tagName.toLowerCase()}.${e.getAttribute("class") || ""} "${e.textContent.trim().slice(0, 40)}"`;

// Any CSS colour to [r, g, b, a], by painting it.
const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
const painted = (colour) => {
  canvas.clearRect(0, 0, 1, 1);
  canvas.fillStyle = colour;
  canvas.fillRect(0, 0, 1, 1);
  const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data;
  return [r, g, b, a / 255];
};
const luminance = (rgb) => {
  const [r, g, b] = rgb.map((c) => ((c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const over = (top, below) => [0, 1, 2].map((i) => top[i] * top[3] + below[i] * (1 - top[3]));
const background = (e) => {
  for (; e; e = e.parentElement) {
    const colour = painted(getComputedStyle(e).backgroundColor);
    if (colour[3] === 1) return colour;
  }
  return [255, 255, 255, 1];
};
const contrast = (e) => {
  const style = getComputedStyle(e);
  const below = background(e);
  const text = painted(e instanceof SVGElement ? style.fill : style.color);
  const opacity = Number(style.opacity);
  const [a, b] = [luminance(over([...text.slice(0, 3), text[3] * opacity], below)), luminance(below)];
  return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
};
const hasText = (e) => [...e.childNodes].some((n) => n.nodeType === Node.TEXT_NODE && n.textContent.trim());
const texts = [...document.querySelectorAll("body *")].filter((e) => hasText(e) && visible(e) && e.tagName !== "TITLE");

const width = document.documentElement.clientWidth;
const scrolled = (e) => e.closest(".scroll, pre") !== null;
const measured = {
  width: window.innerWidth,
  dark: matchMedia("(prefers-color-scheme: dark)").matches,
  pageWidth: document.documentElement.scrollWidth,
  sticksOut: texts.filter((e) => !scrolled(e) && e.getBoundingClientRect().right > width + 1).map(name),
  broken: [...document.images].filter((i) => visible(i) && !i.naturalWidth).map(name),
  numImages: [...document.images].filter((i) => i.naturalWidth).length,
  numCharts: [...document.querySelectorAll("svg")].filter((s) => s.getBoundingClientRect().height > 50).length,
  faint: texts.filter((e) => contrast(e) < 4.5).map((e) => `${contrast(e).toFixed(2)} ${name(e)}`),
  small: [...document.querySelectorAll("svg text")].filter((e) => visible(e) && e.getBoundingClientRect().height < 9).length,
  ran: window.hostileRan === true,
};
const out = document.createElement("pre");
out.id = "measured";
out.textContent = JSON.stringify(measured);
parent.document.body.append(out);
