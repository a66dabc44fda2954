//! we-agent
