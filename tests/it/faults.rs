//! What the control plane does wrong, and what the agent makes of it.
