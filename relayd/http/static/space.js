/** The state of a space as the page names it: ready, no_worker, draining or paused. */
export function stateOfSpace(space) {
  if (space?.state === "paused") return "paused";
  if (space?.state !== "ready") return "no_worker";
  return space.workers && space.draining === space.workers ? "draining" : "ready";
}
