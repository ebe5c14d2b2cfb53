// The page is the server's. Here is only what a server cannot do: the slider beside its number field, the clipboard,
// what was unfolded, and the address bar, which follows when the hand has come to rest (browsers limit its changes).
const field = (id) => document.getElementById(id);
const folds = () => {
  const seen = {}; // two devices of one name have two folds of one title
  return [...document.querySelectorAll("section details")].map((fold) => {
    const title = fold.firstElementChild.textContent;
    seen[title] = (seen[title] ?? 0) + 1;
    return [`${seen[title]} ${title}`, fold];
  });
};
let resting, unfolded;

field("slider").addEventListener("input", ({ target }) => {
  field("ctx").value = target.dataset.contexts.split(" ")[target.value];
});

// Every move has been heard as input.
field("slider").addEventListener("change", (event) => event.stopPropagation());

document.addEventListener("moved", ({ detail }) => {
  if (document.activeElement !== field("slider")) field("slider").value = detail.step;
  field("slider").setAttribute("aria-valuetext", detail.says);
});

document.addEventListener("htmx:beforeSwap", () => {
  unfolded = new Map(folds().map(([title, fold]) => [title, fold.open]));
});

document.addEventListener("htmx:afterSettle", () => {
  for (const [title, fold] of folds()) fold.open = unfolded?.get(title) ?? fold.open;
  clearTimeout(resting);
  resting = setTimeout(() => field("link") && history.replaceState(null, "", field("link").href), 250);
});

document.addEventListener("click", async ({ target }) => {
  if (!target.dataset.copy) return;
  const source = document.querySelector(target.dataset.copy);
  try {
    await navigator.clipboard.writeText(source.href ?? source.textContent);
    target.textContent = "Copied";
  } catch {
    getSelection().selectAllChildren(source);
    target.textContent = "Selected: copy it";
  }
});
