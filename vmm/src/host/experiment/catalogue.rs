//! The plans that come with the program.

use std::path::Path;

use super::ExperimentError;
use super::plan::Plan;

/// Name and text of each, in the order in which they are listed.
pub const CATALOGUE: [(&str, &str); 6] = [
    ("identical-vms", include_str!("../../../../resources/experiments/identical-vms.toml")),
    ("ideal", include_str!("../../../../resources/experiments/ideal.toml")),
    ("side-channel", include_str!("../../../../resources/experiments/side-channel.toml")),
    ("fidelity", include_str!("../../../../resources/experiments/fidelity.toml")),
    ("page-cache", include_str!("../../../../resources/experiments/page-cache.toml")),
    ("scanner-pareto", include_str!("../../../../resources/experiments/scanner-pareto.toml")),
];

/// Names this similar are taken for a slip of the finger, by Jaro and Winkler.
const SIMILAR: f64 = 0.75;

/// All plans that come with the program.
///
/// # Errors
/// One of them is wrong: a fault in Samepage, which a test rules out.
pub fn all() -> Result<Vec<Plan>, ExperimentError> {
    CATALOGUE.iter().map(|(_, text)| Plan::parse(text, Path::new("."))).collect()
}

/// The plan of this name, or in the file of this name.
///
/// # Errors
/// There is neither; the file cannot be read or is no plan.
pub fn find(name: &str) -> Result<Plan, ExperimentError> {
    if let Some((_, text)) = CATALOGUE.iter().find(|(known, _)| *known == name) {
        return Plan::parse(text, Path::new("."));
    }
    let path = Path::new(name);
    if path.exists() || name.contains('/') || name.ends_with(".toml") {
        return Plan::read(path);
    }
    let similar = CATALOGUE.iter().map(|(known, _)| (strsim::jaro_winkler(name, known), *known));
    let best = similar.max_by(|a, b| a.0.total_cmp(&b.0)).filter(|(likeness, _)| *likeness >= SIMILAR);
    Err(ExperimentError::Unknown {
        name: name.into(),
        meant: best.map_or(String::new(), |(_, known)| format!("; did you mean {known:?}?")),
        known: CATALOGUE.map(|(known, _)| known).join(", "),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_plan_that_comes_along_is_right_and_named_as_its_file() {
        let plans = all().unwrap();
        for (plan, (name, _)) in plans.iter().zip(CATALOGUE) {
            assert_eq!(plan.name, name);
            assert!(!plan.about.is_empty() && !plan.source.is_empty() && plan.points().len() > 1, "{name}");
        }
    }

    #[test]
    fn a_slip_of_the_finger_is_answered_with_what_was_meant() {
        let error = find("identical-vm").unwrap_err().to_string();
        assert!(error.contains("did you mean \"identical-vms\"?"), "{error}");
        let error = find("xyzzy").unwrap_err().to_string();
        assert!(!error.contains("did you mean") && error.contains("side-channel"), "{error}");
    }
}
