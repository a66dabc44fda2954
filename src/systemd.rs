//! The service manager: what it is told and asked, the sockets that it keeps for us, and the units it reloads for us.

mod bus;
pub mod listen;
pub mod notify;
mod power;
mod reload;
mod unit;

pub use listen::Listeners;
pub use power::going_down;
pub use reload::{ReloadError, consents_to_reload, reload_unit, reload_units};
pub use unit::{UnitError, Units};
