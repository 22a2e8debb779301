//! Why a guest is not admitted: the kinds by which agents tell one reason from another.

wire::error_kinds! {
    /// Why the fleet does not admit a VM. On the wire a kind is its place in `ALL`, from 1: new ones come last.
    pub enum ErrorKind {
        /// The VM's user and control group belong to no domain of the fleet.
        NoDomain,
        /// The VM has no control socket, so that it could not be measured.
        NoControl,
        /// The VM has less memory than a guest may have, or more.
        MemorySize,
        /// The fleet has as many guests as there may be.
        FleetFull,
        /// The VM's process has ended.
        Ended,
    }
}

/// Why a guest is not admitted, for programs and for people.
pub type Refusal = wire::Refusal<ErrorKind>;

impl ErrorKind {
    /// Its number on the wire; 0 of what has none.
    pub(super) fn code(self) -> u16 {
        let at = (1..).zip(Self::ALL).find(|(_, (kind, _))| *kind == self);
        at.map_or(0, |(code, _)| code)
    }

    /// The kind of this number.
    pub(super) fn of_code(code: u16) -> Self {
        match usize::from(code).checked_sub(1) {
            None => Self::Unsaid,
            Some(at) => Self::ALL.get(at).map_or(Self::Unknown, |(kind, _)| *kind),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kind_has_a_number_of_its_own_and_others_are_understood() {
        for (n, (kind, _)) in (1u16..).zip(ErrorKind::ALL) {
            assert_eq!((kind.code(), ErrorKind::of_code(n)), (n, *kind));
        }
        assert_eq!((ErrorKind::Unsaid.code(), ErrorKind::of_code(0)), (0, ErrorKind::Unsaid));
        assert_eq!(ErrorKind::of_code(u16::MAX), ErrorKind::Unknown);
    }
}
