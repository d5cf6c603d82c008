// A call by WHEP (docs/talk.md): the replies of a conversation are heard, and who speaks is seen, over WebRTC; what is
// said into the microphone is heard by the relay.

import { ask, post } from "./talks.js";

/** Addresses of this machine are looked for so long … */
const GATHER_MS = 1000;
/** … and a call that is not there after this, or was away for so long, is lost. */
const PATIENCE_MS = 4000;

export class Call {
  #video;
  #tell;
  #peer = null;
  #where = null; // the address at which it ends
  #microphone = null; // the stream that is sent along
  state = "calling"; // then "connected", then "ended"

  /** `tell(why)` hears of each change of the state; `why` is null but for a call that was lost. */
  constructor(video, tell) {
    [this.#video, this.#tell] = [video, tell];
  }

  /** Whether the relay hears the microphone. */
  get speaks() {
    return this.#microphone !== null;
  }

  /** Whether it hears silence instead. */
  set muted(muted) {
    for (const track of this.#microphone?.getAudioTracks() ?? []) track.enabled = !muted;
  }

  /** Call the conversation, with the stream of a microphone if there is one; throws if the relay refuses. */
  async start(talk, microphone = null) {
    this.#microphone = microphone;
    if (this.state === "ended") return this.#leave();
    const { iceServers } = await ask("v1/talk/ice");
    const peer = new RTCPeerConnection({ iceServers });
    if (this.state === "ended") return peer.close();
    this.#peer = peer;
    if (microphone) peer.addTransceiver(microphone.getAudioTracks()[0], { direction: "sendrecv" });
    else peer.addTransceiver("audio", { direction: "recvonly" });
    peer.addTransceiver("video", { direction: "recvonly" });
    peer.ontrack = ({ streams: [stream] }) => (this.#video.srcObject = stream);
    peer.onconnectionstatechange = () => {
      if (peer.connectionState === "connected" && this.state === "calling") this.#change("connected");
      if (peer.connectionState === "disconnected") this.#await(() => peer.connectionState === "connected");
      if (["failed", "closed"].includes(peer.connectionState)) this.#lose();
    };
    await peer.setLocalDescription(await peer.createOffer());
    await new Promise((resolve) => {
      setTimeout(resolve, GATHER_MS);
      peer.onicegatheringstatechange = () => peer.iceGatheringState === "complete" && resolve();
    });
    if (this.state === "ended") return;
    this.#await(() => this.state === "connected");
    const answer = await post(`v1/talks/${talk}/whep`, "application/sdp", peer.localDescription.sdp);
    this.#where = answer.headers.get("location").replace(/^\//, "");
    if (this.state === "ended") return this.#leave();
    await peer.setRemoteDescription({ type: "answer", sdp: await answer.text() });
  }

  /** Hang up. */
  end() {
    if (this.state === "ended") return;
    this.#leave();
    this.#change("ended");
  }

  #await(isThere) {
    setTimeout(() => isThere() || this.#lose(), PATIENCE_MS);
  }

  #lose() {
    if (this.state === "ended") return;
    this.#leave();
    this.#change("ended", "call_lost");
  }

  #leave() {
    const [peer, where] = [this.#peer, this.#where];
    [this.#where, this.#video.srcObject] = [null, null];
    peer?.close();
    this.#microphone?.getTracks().forEach((track) => track.stop()); // until then the browser shows that it listens
    if (where) ask(where, { method: "DELETE" }).catch(() => {}); // it may have ended there, too
  }

  #change(state, why = null) {
    this.state = state;
    this.#tell(why);
  }
}
