//! The loop under paused time, with a scripted control plane.
