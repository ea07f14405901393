/* Shows one of the drawings in an element of class "chooser": those whose id ends in "-choice-" and the value of its
select. Without it, the first choice's are seen. */
for (const box of document.querySelectorAll(".chooser")) {
  const select = box.querySelector("select");
  const show = () => {
    for (const drawing of box.querySelectorAll("[id*='-choice-']")) {
      drawing.style.display = drawing.id.endsWith(`-choice-${select.value}`) ? "inline" : "none";
    }
  };
  select.addEventListener("change", show);
  select.closest("[hidden]").removeAttribute("hidden");
  show();
}
