"""Between what pipelines and evaluators speak of and what the database stores."""

from dft_stub.evaluator import Evaluation
from gnome.database.records import CandidateRecord, EvaluationRecord, PredictionRecord
from pipelines.candidate import Candidate, Lineage
from pipelines.screening import Prediction


def candidate_record(candidate: Candidate, number: int) -> CandidateRecord:
    """Store a candidate under its round."""
    lineage = candidate.lineage
    return CandidateRecord(
        id=candidate.id,
        round=number,
        generator=lineage.generator,
        crystal=candidate.crystal,
        parent_id=lineage.parent_id,
        parameters=lineage.parameters,
        seed=lineage.seed,
    )


def candidate_from(record: CandidateRecord) -> Candidate:
    """Take a candidate out of its record."""
    lineage = Lineage(
        generator=record.generator, parent_id=record.parent_id, parameters=dict(record.parameters), seed=record.seed
    )
    return Candidate(crystal=record.crystal, lineage=lineage)


def prediction_record(prediction: Prediction) -> PredictionRecord:
    """Store a prediction."""
    return PredictionRecord(
        candidate_id=prediction.candidate_id,
        model_id=prediction.model_id,
        e_form_per_atom=prediction.e_form_per_atom,
        spread=prediction.spread,
        volume_scale=prediction.volume_scale,
        decomposition_energy=prediction.decomposition_energy,
        p_stable=prediction.p_stable,
        n_competing=prediction.n_competing,
        formula_check=prediction.formula_check,
    )


def prediction_from(record: PredictionRecord, method: str) -> Prediction | None:
    """Take a prediction out of its record; `method` labels it.  None where no decomposition energy was kept, so that none is made up."""
    if record.decomposition_energy is None:
        return None
    return Prediction(
        candidate_id=record.candidate_id,
        e_form_per_atom=record.e_form_per_atom,
        spread=record.spread,
        volume_scale=record.volume_scale,
        model_id=record.model_id,
        method=method,
        decomposition_energy=record.decomposition_energy,
        p_stable=record.p_stable,
        n_competing=record.n_competing or 0,
        formula_check=record.formula_check,
    )


def evaluation_record(evaluation: Evaluation, number: int, *, attempts: int = 1) -> EvaluationRecord:
    """Store an answer, relaxed crystal included; what it means for the hull is told later."""
    return EvaluationRecord(
        candidate_id=evaluation.id,
        method=evaluation.method,
        round=number,
        converged=evaluation.converged,
        failure=None if evaluation.failure is None else str(evaluation.failure),
        message=evaluation.message,
        crystal=evaluation.crystal,
        energy_per_atom=evaluation.energy_per_atom,
        correction_per_atom=evaluation.correction_per_atom,
        e_form_per_atom=evaluation.e_form_per_atom,
        max_force=evaluation.max_force,
        n_steps=evaluation.n_steps,
        cost_seconds=evaluation.cost_seconds,
        forces=evaluation.forces,
        stress=evaluation.stress,
        magnetic_moments=evaluation.magnetic_moments,
        attempts=attempts,
    )
