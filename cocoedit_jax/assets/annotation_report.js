"use strict";
// Data: columns of numbers (null = no score), as written by cocoedit_jax/annotation/report.py.
const data = JSON.parse(document.getElementById("data").textContent);
const controls = [...document.querySelectorAll("input[data-rule]")];

function number(text) {
  return Number(text).toLocaleString("en", { maximumFractionDigits: 3 });
}

function passes(index, rules) {
  for (const [column, low, high] of rules) {
    const value = data.columns[column][index];
    // As the filter does: a score that is missing fails where it is asked for.
    if (value === null || (low !== null && value < low) || (high !== null && value > high)) return false;
  }
  return true;
}

function preview() {
  const rules = [];
  const chosen = { ...data.thresholds };
  for (const input of controls) {
    // Until it is moved, what was chosen, which a slider may only come near.
    const value = Number(input.dataset.moved ? input.value : input.dataset.start);
    const low = input.dataset.side === "min";
    document.getElementById(`value-${input.id}`).textContent = number(value);
    if (input.dataset.unused !== "yes") {
      rules.push([input.dataset.rule, low ? value : null, low ? null : value]);
      chosen[input.id] = value;
    }
  }
  const counts = data.types.map(() => 0);
  let total = 0;
  for (let index = 0; index < data.type.length; index++) {
    if (passes(index, rules)) {
      counts[data.type[index]]++;
      total++;
    }
  }
  const share = data.type.length ? (100 * total) / data.type.length : 0;
  document.getElementById("passing").textContent = `${total} of ${data.type.length} (${share.toFixed(1)} %)`;
  data.types.forEach((_, index) => {
    document.getElementById(`passing-${index}`).textContent = counts[index];
  });
  document.getElementById("refilter").textContent = [
    data.command,
    // All of them: the command knows of no configuration file. No value here needs quotes in a shell.
    ...Object.entries(chosen).map(([name, value]) => `--config.filter.${name}=${value === null ? "None" : value}`),
  ].join(" ");
}

function move(input) {
  input.dataset.moved = "yes";
  delete input.dataset.unused;
}

for (const input of controls) {
  input.addEventListener("input", () => {
    move(input);
    preview();
  });
}
document.getElementById("reset").addEventListener("click", () => {
  for (const input of controls) {
    input.value = input.dataset.start;
    delete input.dataset.moved;
    if (input.dataset.off) input.dataset.unused = "yes";
  }
  preview();
});
// report.html#min_clarity=0.8&max_area=0.5 opens with these thresholds.
for (const [name, value] of new URLSearchParams(location.hash.slice(1))) {
  const input = controls.find((control) => control.id === name);
  if (input && value !== "" && Number.isFinite(Number(value))) {
    input.value = value;
    move(input);
  }
}
preview();

// --- audit ------------------------------------------------------------------
const cards = [...document.querySelectorAll("[data-audit]")];

function verdict(card) {
  const chosen = card.querySelector("input[type=radio]:checked");
  return chosen ? chosen.value : "";
}

function cell(value) {
  let text = value === null || value === undefined ? "" : String(value);
  if (typeof value === "string" && /^[=+\-@\t\r]/.test(text)) text = `'${text}`; // spreadsheets would run it
  return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

function csv() {
  const header = [...data.audit_fields, "verdict", "note"];
  const rows = cards.map((card) => {
    const record = data.audit[Number(card.dataset.audit)];
    return [...record, verdict(card), card.querySelector("input[type=text]").value];
  });
  return [header, ...rows].map((row) => row.map(cell).join(",")).join("\r\n") + "\r\n";
}

function agreement() {
  let done = 0;
  let agree = 0;
  for (const card of cards) {
    const said = verdict(card);
    if (!said || said === "unsure") continue;
    done++;
    if ((said === "good") === (card.dataset.status === "kept")) agree++;
  }
  const share = done ? ` The filter agrees with ${agree} of ${done} (${((100 * agree) / done).toFixed(0)} %).` : "";
  document.getElementById("agreement").textContent = `${done} of ${cards.length} judged.${share}`;
}

document.getElementById("export").addEventListener("click", () => {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob(["\ufeff", csv()], { type: "text/csv;charset=utf-8" }));
  link.download = "audit.csv";
  link.click();
  URL.revokeObjectURL(link.href);
});
for (const card of cards) card.addEventListener("change", agreement);
agreement();
