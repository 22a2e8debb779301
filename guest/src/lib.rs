//! What runs inside a guest.
#![no_std]
