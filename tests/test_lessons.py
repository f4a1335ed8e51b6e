"""What users of other tuning libraries were hurt by, and what holds each of these cases here: a test, or why it cannot occur.

Sources are public issues: peft, transformers (tf), trl, accelerate (acc), unsloth (un), LLaMA-Factory (LF), axolotl (ax),
sentence-transformers (st), adapters (ad) and others by their names.
"""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

TESTS = Path(__file__).parent

ONE_PROCESS = "Cannot occur: training is one process on one device; nothing is sharded."

# (source, case, tests by `file::function`, or a reason why it cannot occur)
SILENT = [
    ("peft#1959, #3554, #3600, #3603, #3658, #3693", "one target among several matches nothing and is skipped",
     ["tuned/test_attach.py::test_one_target_of_several_without_a_match_is_an_error",
      "tuned/test_attach.py::test_all_unmatched_targets_are_named_at_once",
      "tuned/test_attach.py::test_an_exclusion_that_excludes_nothing_is_an_error",
      "tuned/test_attach.py::test_one_block_of_several_without_a_site_is_an_error",
      "tuned/test_attach.py::test_one_target_of_several_outside_the_blocks_is_an_error",
      "deltas/test_bitfit.py::test_a_target_without_biases_is_not_dropped_silently",
      "contract/test_methods.py::test_targets_without_a_match_leave_the_model_alone"]),
    ("peft#3582", "a key of rank_pattern or alpha_pattern matches no layer",
     ["deltas/test_lora.py::test_patterns_that_match_nothing_are_errors_all_of_them"]),
    ("peft#3755", "modules to train whole match too much by their ends, or nothing",
     ["checkpoint/test_peft.py::test_fields_that_change_the_meaning_are_refused_by_name",
      "contract/test_methods.py::test_targets_without_a_match_leave_the_model_alone"]),
    ("peft#2115, #2084, #1323, #1932", "loading with missing, unexpected or misspelled tensors does nothing",
     ["checkpoint/test_peft.py::test_tensors_that_do_not_fit_are_refused",
      "checkpoint/test_peft.py::test_a_layer_that_is_lost_as_a_whole_is_missed",
      "tuned/test_attach.py::test_state_that_does_not_fit_is_refused_and_changes_nothing",
      "checkpoint/test_native.py::test_records_that_are_wrong"]),
    ("peft#2699, #2773", "a delta's name that is part of layer or tensor names breaks its keys",
     ["tuned/test_attach.py::test_a_delta_may_have_any_name_even_one_of_a_method_or_a_layer",
      "checkpoint/test_native.py::test_a_name_within_other_names_does_no_harm"]),
    ("peft#515, #793, #1389, #1523, un#2142", "the tuned model answers exactly as the base does",
     ["train/test_guards.py::test_nothing_changed_after_two_steps_is_an_error",
      "train/test_guards.py::test_layers_that_never_run_and_parameters_without_gradients_are_warnings",
      "checkpoint/test_native.py::test_saved_and_loaded_it_is_the_same_to_the_last_bit",
      "checkpoint/test_native.py::test_another_base_is_refused_with_both_fingerprints"]),
    ("peft#1746", "tensors of other shapes than the ranks say are loaded",
     ["checkpoint/test_peft.py::test_fields_that_change_the_meaning_are_refused_by_name",
      "checkpoint/test_native.py::test_another_size_of_model_lists_what_does_not_fit"]),
    ("peft#282", "a loaded delta is frozen, and training on trains nothing",
     ["checkpoint/test_native.py::test_a_loaded_delta_trains_on"]),
    ("trl#6700", "the optimizer holds no parameter; what is saved is what was there at the start",
     ["train/test_optimizer.py::test_nothing_to_train_is_refused",
      "train/test_guards.py::test_no_gradient_at_all_is_an_error",
      "train/test_hf.py::test_an_optimizer_of_other_parameters_is_an_error"]),
    ("trl#3926", "the trainer freezes a delta that it was given",
     ["train/test_hf.py::test_deltas_that_someone_froze_are_an_error"]),
    ("lerobot#3459", "resuming wraps a second time and drops what was trained",
     ["checkpoint/test_native.py::test_loading_twice_under_one_name_is_refused",
      "train/test_resume.py::test_resumed_from_any_step_it_ends_with_the_same_tensors_and_events"]),
    ("peft#2295, #2306", "attaching twice nests one delta in the other",
     ["tuned/test_attach.py::test_attaching_twice_is_an_error_and_further_deltas_get_their_own_name",
      "tuned/test_attach.py::test_attaching_around_prefixes_is_refused_too"]),
    ("un#2343", "a preparing step freezes trainable biases again",
     ["contract/test_methods.py::test_only_deltas_train",
      "contract/test_methods.py::test_every_delta_parameter_gets_a_finite_gradient"]),
    ("trl#2486, LF#6357, microsoft/LoRA#120, open-unlearning#178", "reentrant checkpointing of activations loses gradients",
     ["tuned/test_attach.py::test_reentrant_activation_checkpointing_is_refused",
      "train/test_loop.py::test_gradient_checkpointing_is_the_same_training"]),
    ("PEFT's guide on troubleshooting", "an optimizer made before the deltas has no hold on them",
     ["train/test_hf.py::test_an_optimizer_of_other_parameters_is_an_error"]),
    ("peft#1402", "one matrix of a delta stays all zero",
     ["train/test_guards.py::test_parameters_that_do_not_change_are_warnings",
      "contract/test_methods.py::test_every_delta_parameter_gets_a_finite_gradient"]),
    ("peft#2642", "the classification head does not train beside a prompt",
     ["contract/test_methods.py::test_a_new_head_trains_beside_any_method"]),
    ("st#3842, peft#3373, #3402", "nobody calls the controller of a method whose ranks move, so that they stay",
     ["train/test_loop.py::test_controllers_are_called_once_a_step_and_finished",
      "train/test_hf.py::test_accumulation_calls_controllers_once_a_step_and_is_one_large_batch"]),
    ("peft#577, #602, #756, #876, st#3980, st#3402", "a classifier's head is neither saved nor restored",
     ["checkpoint/test_native.py::test_heads_are_flagged_and_come_back",
      "contract/test_methods.py::test_a_new_head_trains_beside_any_method",
      "checkpoint/test_peft.py::test_classifiers_keep_their_heads"]),
]

ARITHMETIC = [
    ("peft#3004, #3013, #1155, #3111, #3449, #3761", "a weighted sum of deltas has cross terms, or ignores scales and biases",
     ["checkpoint/test_convert.py::test_a_sum_is_exact", "checkpoint/test_convert.py::test_dora_sums_too",
      "checkpoint/test_convert.py::test_what_cannot_be_summed"]),
    ("peft#3741, #2486", "a merged bias lacks its scale; the check for NaN in biases looks at one value",
     ["tuned/test_merging.py::test_one_value_that_is_not_finite_stops_a_merge",
      "contract/test_fold.py::test_layer_with_delta_equals_folded_layer",
      "checkpoint/test_peft.py::test_fields_that_change_the_meaning_are_refused_by_name"]),
    ("peft#3306", "trained biases are dropped when saving",
     ["checkpoint/test_native.py::test_saved_and_loaded_it_is_the_same_to_the_last_bit",
      "checkpoint/test_peft.py::test_what_peft_trained_computes_the_same_here_and_there_again"]),
    ("peft#3756", "merging one of several active deltas switches the others off",
     ["tuned/test_merging.py::test_lanes_and_merging"]),
    ("peft#3608", "several deltas with magnitudes, merged, differ from unmerged ones",
     ["tuned/test_merging.py::test_several_magnitudes_at_one_layer_merge_exactly"]),
    ("peft#2184, #2270, tf#34468", "an initial value from the weights changes the base under all other deltas",
     ["deltas/test_lora.py::test_pissa_trains_from_the_singular_directions_and_changes_nothing_at_birth",
      "checkpoint/test_peft.py::test_pissa_leaves_the_base_to_others"]),
    ("peft#2018, #2777, #2864, #2972, tf#45127, tf#45156, LF#6749", "tied embeddings: merged models lose one side",
     ["tuned/test_merging.py::test_changing_one_side_of_tied_embeddings_unties_and_says_so",
      "tuned/test_merging.py::test_both_sides_trained_as_one_tensor_stay_tied",
      "checkpoint/test_merged.py::test_untied_embeddings_keep_both_sides",
      "checkpoint/test_merged.py::test_untied_embeddings_of_an_encoder_decoder"]),
    ("peft#1388, #2502, #1836, #1035, #3412", "merging in 16 bits rounds and gives no measure; unmerging is not exact",
     ["tuned/test_merging.py::test_the_rounding_error_is_reported_and_unmerging_16_bits_is_exact",
      "tuned/test_merging.py::test_logits_error_is_measured_and_leaves_the_state_alone"]),
    ("peft#2321, #1043, #2105, #1080, tf#31293, qlora#28", "merging into a base of 4 bits loses quality",
     ["tuned/test_merging_quantised.py::test_merging_is_dense_by_default_and_says_what_requantising_costs"]),
    ("peft#3216", "unmerging scales divides by nearly zero, or forgets biases",
     ["tuned/test_merging.py::test_scales_of_zero_come_back",
      "tuned/test_merging.py::test_merged_equals_unmerged_and_unmerging_is_bit_exact"]),
    ("peft#3705", "a safe merge that fails has changed the weight",
     ["tuned/test_merging.py::test_a_layer_that_fails_late_leaves_the_earlier_ones_alone",
      "tuned/test_merging.py::test_one_value_that_is_not_finite_stops_a_merge"]),
    ("peft#3574", "several deltas on norms, not all of them at every layer, raise a KeyError",
     ["tuned/test_merging.py::test_lanes_at_different_layers_merge_one_by_one"]),
    ("LF#2505, #2771, #3096, #5186, #5930, #6105, #8134, #9346, #10596", "the merged model answers otherwise than the delta",
     ["tuned/test_merging.py::test_merged_equals_unmerged_and_unmerging_is_bit_exact",
      "checkpoint/test_merged.py::test_transformers_loads_what_was_merged"]),
    ("un#611, #1519, #1558, #2013, #2374, #3508, #3882, #5410, #6309", "an exported model differs from the one in memory",
     ["checkpoint/test_merged.py::test_transformers_loads_what_was_merged",
      "checkpoint/test_merged.py::test_what_transformers_would_load_otherwise_is_not_written",
      "checkpoint/test_merged.py::test_another_type_on_disk"]),
    ("un#9331", "trained embeddings and heads are dropped when saving",
     ["checkpoint/test_merged.py::test_a_trained_head_is_in_the_merged_model",
      "checkpoint/test_native.py::test_shared_tensors_are_written_once"]),
    ("peft#430", "what is given back as the base still holds the delta",
     ["contract/test_methods.py::test_detach_gives_the_model_back"]),
    ("peft#741", "with trained biases, switching off does not give the base",
     ["deltas/test_bitfit.py::test_trained_bias_switched_off_is_the_base_bit_for_bit",
      "contract/test_methods.py::test_nothing_changes_at_birth",
      "contract/test_methods.py::test_lanes_by_call_and_by_row"]),
]

PROMPTS = [
    ("peft#869, #2191", "a prefix and checkpointing of activations exclude one another, by the order of the calls",
     ["contract/test_methods.py::test_activation_checkpointing_gives_the_same_gradients",
      "tuned/test_attach.py::test_checkpointing_may_be_switched_on_before_attaching",
      "test_attention_models.py::test_checkpointing_gives_the_same_gradients"]),
    ("peft#2035, #2449, #2662, #3205", "each new form of the cache breaks prefixes",
     ["test_attention_models.py::test_prefix_equals_a_prefilled_cache",
      "test_attention_models.py::test_generate_with_prefix_equals_no_cache",
      "contract/test_methods.py::test_generation_with_a_cache_equals_greedy_choice_without"]),
    ("peft#2256, tf#35087", "a saved prompt cannot be resumed, stopped early or restored at its best",
     ["train/test_resume.py::test_prompts_and_prefixes_resume_stop_early_and_keep_their_best",
      "train/test_hf.py::test_the_trainer_can_load_the_best_delta_at_the_end"]),
    ("PEFT's `Cannot set a prompt learning adapter to trainable`", "a loaded prompt or prefix does not train on",
     ["checkpoint/test_native.py::test_the_network_of_a_prefix_is_saved_and_trains_on",
      "checkpoint/test_native.py::test_saved_and_loaded_it_is_the_same_to_the_last_bit"]),
    ("peft#1607, #2043", "the network that makes the prompt is gone after saving",
     ["checkpoint/test_native.py::test_the_network_of_a_prefix_is_saved_and_trains_on",
      "deltas/test_prefix.py::test_the_network_is_in_the_state_once_and_goes_on_from_it"]),
    ("peft#710, #2642, P-tuning-v2#57, prompt-tuning#151", "the loss does not fall",
     ["contract/test_methods.py::test_loss_falls_the_same_for_the_same_seed",
      "contract/test_methods.py::test_every_delta_parameter_gets_a_finite_gradient"]),
    ("peft#183, #445, #720, #1022, #2307, #2595", "prompts and prefixes cannot be used together with LoRA",
     ["contract/test_methods.py::test_composes_with_lora",
      "train/test_resume.py::test_prompts_and_prefixes_resume_stop_early_and_keep_their_best"]),
]

SAVING = [
    ("peft#1452, #1478, #3211", "saving asks the network and fails at the end of a run",
     ["checkpoint/test_native.py::test_saving_needs_no_network"]),
    ("peft#286, #453, #1328, #1710, trl#4416", "empty tensors are saved",
     ["checkpoint/test_native.py::test_empty_tensors_are_not_saved",
      "checkpoint/test_peft.py::test_tensors_that_do_not_fit_are_refused"]),
    ("acc#4206", "a sharded save keeps one process's share, and resuming loses the rest",
     ["checkpoint/test_peft.py::test_a_layer_that_is_lost_as_a_whole_is_missed"]),
    ("peft#484, ax#1482, ax#1494, LF#3853, LF#7993, trl#1723", "sharding wants one type for base and delta", ONE_PROCESS),
    ("peft#2834", "several deltas on a sharded quantised base", ONE_PROCESS),
    ("peft#2071, #1700, #276, #1337", "sizes do not match, and no word on which setting differs",
     ["checkpoint/test_native.py::test_another_size_of_model_lists_what_does_not_fit",
      "checkpoint/test_peft.py::test_fields_that_change_the_meaning_are_refused_by_name"]),
    ("tf#24096, #28531, #35850, #24274, #36201, #29078, peft#394, st#3470", "the best checkpoint, or one of a named delta, "
     "is not found",
     ["train/test_loop.py::test_the_best_delta_can_be_restored",
      "train/test_resume.py::test_the_best_delta_survives_a_resume",
      "train/test_resume.py::test_a_named_delta_resumes_and_restores_beside_another",
      "train/test_hf.py::test_the_trainer_can_load_the_best_delta_at_the_end"]),
    ("ad#122, #487", "restoring tries to load a whole model",
     ["train/test_hf.py::test_checkpoints_hold_the_deltas_alone_and_resume_the_same",
      "train/test_hf.py::test_the_trainer_can_load_the_best_delta_at_the_end"]),
    ("LF#708, #1840, #1990, #2389, #3073, #5055, #7085", "resuming begins anew or diverges",
     ["train/test_resume.py::test_resumed_from_any_step_it_ends_with_the_same_tensors_and_events",
      "train/test_resume.py::test_killed_and_resumed_it_ends_the_same",
      "train/test_resume.py::test_other_settings_are_refused_by_name"]),
    ("peft#3676", "tensors without a dimension crash where sizes are compared",
     ["checkpoint/test_native.py::test_saved_and_loaded_it_is_the_same_to_the_last_bit",
      "checkpoint/test_native.py::test_values_are_read_without_torch"]),
    ("peft#341, diffusers#6442, tf#23165, tf#30559", "deltas and heads in fp16 cannot be clipped",
     ["train/test_loop.py::test_a_base_in_fp16_has_float32_deltas_that_can_be_clipped",
      "contract/test_methods.py::test_half_precision_model_keeps_full_precision_deltas"]),
]

LESSONS = [*SILENT, *ARITHMETIC, *PROMPTS, *SAVING]


@cache
def functions_in(file: str) -> frozenset[str]:
    tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
    return frozenset(node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"))


@pytest.mark.parametrize(("source", "case", "held"), LESSONS, ids=[case[:50] for _, case, _ in LESSONS])
def test_what_holds_a_lesson_exists(source: str, case: str, held: list[str] | str) -> None:
    assert source and case
    if isinstance(held, str):
        assert held.startswith("Cannot occur")
        return
    assert held
    missing = [node for node in held if node.partition("::")[2] not in functions_in(node.partition("::")[0])]
    assert missing == []


def test_no_lesson_is_forgotten() -> None:
    """The numbers of cases that the study of other libraries' issues found, by kind."""
    assert [len(cases) for cases in (SILENT, ARITHMETIC, PROMPTS, SAVING)] == [19, 17, 7, 11]
