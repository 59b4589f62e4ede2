"use strict";
// Gives the grades out as a file. Works without a network, and in a frame that may neither submit forms nor store anything.
(() => {
  const list = document.getElementById("ratings");
  if (!list) return;
  document.documentElement.classList.add("js");
  const rows = [...list.children];
  const button = document.getElementById("save");
  const progress = document.getElementById("progress");

  function grade(number, side) {
    const chosen = list.querySelector(`input[name="${number}-${side}"]:checked, input[name="${number}-ab"]:checked`);
    return chosen ? chosen.value : null;
  }

  function rated() {
    return rows
      .map((row, number) => ({
        id: row.dataset.id,
        a: grade(number, "a"),
        b: grade(number, "b"),
        comment: row.querySelector(".comment").value.trim(),
      }))
      .filter((row) => row.a && row.b);
  }

  function show() {
    const done = rated().length;
    progress.textContent = `${done} of ${rows.length} rows graded`;
    button.disabled = done === 0;
  }

  button.addEventListener("click", () => {
    const given = { format: 1, ...JSON.parse(document.getElementById("given-out").textContent), ratings: rated() };
    const text = JSON.stringify(given, null, 1);
    document.getElementById("json").value = text;
    document.getElementById("saved").hidden = false;
    document.getElementById("key").open = true;
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
    link.download = `ratings-${given.candidate.slice(0, 12)}.json`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  });
  document.getElementById("json").addEventListener("focus", (event) => event.target.select());
  list.addEventListener("change", show);
  show();
})();
