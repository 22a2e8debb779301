//! Why the daemon did not do what it was asked.

/// The error of its answer.
pub type Refusal = wire::Refusal<ErrorKind>;

wire::error_kinds! {
    /// Which error the daemon answers with.
    pub enum ErrorKind {
        /// The line is no request that this daemon knows, with the keys that it takes.
        NotARequest,
        /// Another client has had the fleet for too long; ask again.
        Busy,
        /// The fleet is ending, or the client that asked has disconnected.
        Interrupted,
        /// The fleet has no guest of this name.
        NoSuchGuest,
        /// The guest is paused: it cannot answer before it is resumed.
        GuestPaused,
        /// The guest's VM has ended.
        GuestEnded,
        /// The guest, or its VM process, does not answer, or not in time.
        GuestSilent,
        /// The guest, or its VM process, answered that it cannot.
        GuestRefused,
        /// The socket of a guest's VM process failed.
        GuestUnreachable,
        /// The guest was not captured, and runs on.
        NotCaptured,
        /// There is no snapshot of this name, or none can be taken under it.
        Snapshot,
        /// A checkpoint was not saved, read or used; the text says why.
        Checkpoint,
        /// The clones were not started: too many, not admitted, or without a TAP of their own.
        NotCloned,
        /// The guests' pages could not be measured or checked.
        Measuring,
        /// The merging engine failed.
        Merging,
        /// The host, its memory or the fleet's files are not as the fleet needs them; the text says what.
        Host,
    }
}
