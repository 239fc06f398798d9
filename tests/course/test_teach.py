"""What a failing test of an exercise says.   pytest tests/course/test_teach.py"""

import pytest
import teach
import torch
import torch.nn.functional as F

SPEC = torch.tensor([1.0, 2.0, 4.0, 5.0])


@pytest.mark.parametrize("yours, said", [
    (torch.tensor([1.0, 2.0, 4.0, float("nan")]), "it is not finite"),
    (torch.tensor([2.0, 1.0, 4.0, 5.0]), "the right values, in another order"),
    (-0.5 * SPEC, "the right value times -0.5"),
    (torch.tensor([1.0, 2.0, 4.0, 7.0]), "right but for 1 of 4 places, the first at 3"),
    (torch.tensor([9.0, 8.0, 3.0, 7.0]), "work it out by hand"),
    (torch.ones(2, 2), "yours has the shape (2, 2), it must be (4,)"),
    ("four", "a Tensor is asked for"),
    (SPEC + 1, "one is added"),
])
def test_a_wrong_value_is_told_by_what_is_wrong_with_it(yours, said):
    with pytest.raises(pytest.fail.Exception) as caught:
        teach.check(yours, SPEC, {"one is added": SPEC + 1})
    assert said in str(caught.value) and "test_teach.py:" in str(caught.value)


def test_the_right_value_passes_and_a_test_that_cannot_tell_does_not():
    teach.check(SPEC.clone(), SPEC, {"one is added": SPEC + 1})
    with pytest.raises(AssertionError, match="cannot tell"):
        teach.check(SPEC, SPEC, {"none at all": SPEC.clone()})


@pytest.mark.parametrize("yours, said", [
    (lambda x: F.normalize(x.detach(), dim=0).sum(), "on x:\nyours.*\n.*\nwhy: no gradient reaches it"),
    (lambda x: (x / x.detach().norm()).sum(), "not its gradient on x:"),
    (lambda x: F.normalize(x, dim=0).sum() + 1, "^yours: "),
])
def test_a_right_value_with_a_wrong_gradient_is_told(yours, said):
    x = torch.tensor([3.0, 4.0], requires_grad=True)
    right = (x / (x * x).sum().sqrt()).sum()
    teach.check_gradients(F.normalize(x, dim=0).sum(), right, {"x": x})
    with pytest.raises(pytest.fail.Exception, match=said):
        teach.check_gradients(yours(x), right, {"x": x})
