// Quantities as people read them.

const UNITS = ["B", "KB", "MB", "GB", "TB"];

/** 1536 -> "1.5 KB", as the command line has it. */
export function bytes(count) {
  let unit = 0;
  while (count >= 1000 && unit < UNITS.length - 1) {
    count /= 1000;
    unit += 1;
  }
  return `${unit === 0 ? count : count.toFixed(1)} ${UNITS[unit]}`;
}

/** 0.0123 -> "12.3 ms", 4.2 -> "4.20 s"; nothing known is a dash. */
export function seconds(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  if (value < 0.001) return value === 0 ? "0 ms" : "<1 ms";
  if (value < 0.1) return `${(1000 * value).toFixed(1)} ms`;
  if (value < 1) return `${Math.round(1000 * value)} ms`;
  return value < 100 ? `${value.toFixed(2)} s` : span(value);
}

/** A long time, roughly: "42 s", "4 min", "3 h". */
export function span(value) {
  if (value < 90) return `${Math.max(0, Math.round(value))} s`;
  if (value < 5400) return `${Math.round(value / 60)} min`;
  return value < 172800 ? `${Math.round(value / 3600)} h` : `${Math.round(value / 86400)} d`;
}

/** A rate or a count with at most three digits that matter. */
export function number(value) {
  return value >= 100 ? Math.round(value).toLocaleString() : String(Number(value.toPrecision(3)));
}

/** Milliseconds, or that there were none. */
export const milliseconds = (value) => (value === null ? "–" : seconds(value / 1000));

/** The time of day of a unix time, to the "second" or "minute". */
export function clock(unix, to = "second") {
  const parts = { hour: "2-digit", minute: "2-digit", second: to === "second" ? "2-digit" : undefined };
  return new Date(1000 * unix).toLocaleTimeString([], { ...parts, hourCycle: "h23" });
}
