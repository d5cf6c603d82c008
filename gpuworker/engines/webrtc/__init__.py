"""Engine `webrtc`: calls with browsers."""
