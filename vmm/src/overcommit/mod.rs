//! Promising more memory than there is: what is promised, what is owed, and what could pay it.
//!
//! Everything here is computed from plain numbers. Who reads them off the host and who carries decisions out is in
//! [`crate::host`]. Pages are of 4096 bytes throughout.

pub mod ledger;
